"""DFA: a teacher's layers mixed into one hint per stage, in shares found by bi-level search; then distillation.

Guan et al., Differentiable Feature Aggregation Search for Knowledge Distillation, ECCV 2020.

KDNAS_CIFAR100=PATH kdnas run --experiment dfa --out runs/dfa     # full size: CIFAR-100
kdnas run --experiment dfa:small --out runs/dfa                   # digits, about a minute on two CPU cores

It searches the hint, not the student: the student is the ranking's first place within the budget, and its retraining is
DFA. As published: groups of equal size, two paths, alternation on two parts of the training images, a new student for
the distillation. Published: 79.74, 78.18 and 75.85 % on CIFAR-100 for three pairs of teacher and student.
Differs: the pairs' networks, lengths, rates and weights are ours.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.data import cifar100, digits
from kdnas.distillers import Aggregation, SinglePath
from kdnas.scorers import Accuracy
from kdnas.settings import Retrain, Search, Train

SYSTEM = "labels in the supernet; the student learns hints mixed of all the teacher's layers"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("elastic_resnet"),
            data=spec(cifar100, path=os.environ.get("KDNAS_CIFAR100", "cifar100")),
            distiller=spec(SinglePath),
            recipe=Recipe(steps=60_000, batch_size=128, learning_rate=0.05),
            teacher=FitTeacher(recipe=Recipe(steps=60_000, batch_size=128, learning_rate=0.1), blocks=3),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=60e6), num_evaluations=1000, num_images=5000),
        retrain=Retrain(distiller=spec(Aggregation), recipe=Recipe(steps=120_000, batch_size=128)),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=spec(SinglePath),
            recipe=Recipe(steps=200, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=150, learning_rate=0.1), blocks=3),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=3e5), num_evaluations=60, num_images=220),
        retrain=Retrain(distiller=spec(Aggregation), recipe=Recipe(steps=300, learning_rate=0.1)),
    )
