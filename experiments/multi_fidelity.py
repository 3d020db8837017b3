"""MF-KD: networks of low fidelity trained under the teacher, a Gaussian process over them, the best it predicts.

Trofimov et al., Multi-fidelity Neural Architecture Search with Knowledge Distillation, 2020.

KDNAS_CIFAR10=PATH kdnas run --experiment multi_fidelity --out runs/mfkd   # full size: CIFAR-10
kdnas run --experiment multi_fidelity:small --out runs/mfkd                # digits, about three minutes on one CPU core

As published (MFKD2): networks of low fidelity under the teacher and Gaussian-process regression; its best five begin a
second phase of ten networks of high fidelity. The contrast is the same search with trainings on labels alone.
Differs: the fidelity is the number of steps, not a part of the data; in the first phase a training is stopped after a
ninth or a third of its steps by successive halving (Optuna's pruner), and its process knows how far each one came; the
loss is the framework's own (0.9 of the divergence at temperature 4), theirs is the divergence alone at 32, or NST.
"""

import os

from optuna.pruners import SuccessiveHalvingPruner

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.data import cifar10, digits
from kdnas.distillers import FromLabels
from kdnas.scorers import ShortTraining
from kdnas.searchers import GaussianProcess
from kdnas.settings import Retrain, Search, Train

SYSTEM = "short trainings under the teacher, a Gaussian process predicts the best network"


def experiment() -> Experiment:
    short = {"steps": 900, "batch_size": 128, "num_rungs": 3}
    long = {"steps": 4500, "batch_size": 128}
    return Experiment(
        train=Train(
            space=load_space("elastic_resnet"),
            data=spec(cifar10, path=os.environ.get("KDNAS_CIFAR10", "cifar10")),
            distiller=None,
            teacher=FitTeacher(recipe=Recipe(steps=35_000, batch_size=128, learning_rate=0.1)),
        ),
        search=Search(
            scorer=spec(ShortTraining, **short),
            contrast=spec(ShortTraining, distiller=spec(FromLabels), **short),
            searcher=spec(GaussianProcess),
            pruner=spec(SuccessiveHalvingPruner),
            num_evaluations=100,
            num_images=5000,
        ),
        second=Search(
            scorer=spec(ShortTraining, **long),
            contrast=spec(ShortTraining, distiller=spec(FromLabels), **long),
            searcher=spec(GaussianProcess, num_initial=5, batch=1),
            initial=5,
            num_evaluations=10,
            num_images=5000,
        ),
        retrain=Retrain(recipe=Recipe(steps=80_000, batch_size=128, learning_rate=0.1)),
    )


def small() -> Experiment:
    short = {"steps": 36, "batch_size": 64, "num_rungs": 3}
    long = {"steps": 120, "batch_size": 64}
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=None,
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(
            scorer=spec(ShortTraining, **short),
            contrast=spec(ShortTraining, distiller=spec(FromLabels), **short),
            searcher=spec(GaussianProcess, num_initial=24),
            pruner=spec(SuccessiveHalvingPruner),
            budget=Budget(macs=6e5),
            num_evaluations=48,
            num_images=220,
        ),
        second=Search(
            scorer=spec(ShortTraining, **long),
            contrast=spec(ShortTraining, distiller=spec(FromLabels), **long),
            searcher=spec(GaussianProcess, num_initial=5, batch=1),
            budget=Budget(macs=6e5),
            initial=5,
            num_evaluations=10,
            num_images=220,
        ),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
