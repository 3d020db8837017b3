"""MF-KD: networks of low fidelity trained under the teacher, a Gaussian process over them, the best it predicts.

Trofimov et al., Multi-fidelity Neural Architecture Search with Knowledge Distillation, 2020.

KDNAS_CIFAR10=PATH kdnas run --experiment multi_fidelity --out runs/mfkd   # full size: CIFAR-10
kdnas run --experiment multi_fidelity:small --out runs/mfkd                # digits, about three minutes on one CPU core

As published: 30 networks, a short training under the teacher each, Gaussian-process regression, its argmax.
The contrast is the same search with short trainings on labels alone.
Differs: the search goes on after the first argmax; the fidelity is the number of steps, not a part of the data; the
paper's second phase of high fidelity is the retraining of the one network that is chosen.
"""

import os

from kdnas.cost import Budget
from kdnas.data import cifar10, digits
from kdnas.distillers.from_labels import FromLabels
from kdnas.jobs.settings import Experiment, Retrain, Search, Train
from kdnas.scorers.short_training import ShortTraining
from kdnas.searchers.gaussian_process import GaussianProcess
from kdnas.spec import spec
from kdnas.tables import load_space
from kdnas.training import Recipe

SYSTEM = "short trainings under the teacher, a Gaussian process predicts the best network"


def experiment() -> Experiment:
    short = {"steps": 1000, "batch_size": 128}
    return Experiment(
        train=Train(
            space=load_space("elastic_resnet"),
            data=spec(cifar10, path=os.environ.get("KDNAS_CIFAR10", "cifar10")),
            distiller=None,
            teacher_recipe=Recipe(steps=35_000, batch_size=128, learning_rate=0.1),
        ),
        search=Search(
            scorer=spec(ShortTraining, **short),
            contrast=spec(ShortTraining, distiller=spec(FromLabels), **short),
            searcher=spec(GaussianProcess),
            num_evaluations=100,
            num_images=5000,
        ),
        retrain=Retrain(recipe=Recipe(steps=80_000, batch_size=128, learning_rate=0.1)),
    )


def small() -> Experiment:
    short = {"steps": 25, "batch_size": 64}
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=None,
            teacher_recipe=Recipe(steps=200, learning_rate=0.1),
        ),
        search=Search(
            scorer=spec(ShortTraining, **short),
            contrast=spec(ShortTraining, distiller=spec(FromLabels), **short),
            searcher=spec(GaussianProcess, num_initial=24),
            budget=Budget(macs=6e5),
            num_evaluations=48,
            num_images=220,
        ),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
