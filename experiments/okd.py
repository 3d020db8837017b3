"""OKD: of three (published: five) teachers those that are right teach; a fixed network is enlarged under a cap.

Kang, Mun, Han, Towards Oracle Knowledge Distillation with Neural Architecture Search, AAAI 2020.

KDNAS_CIFAR100=PATH kdnas run --experiment okd --out runs/okd     # full size: ResNet-32 and six layers, CIFAR-100
kdnas run --experiment okd:small --out runs/okd                   # digits, about a minute on two CPU cores

As published: the fixed network, operations and connections, shared weights, an LSTM controller by REINFORCE rewarded
with accuracy, a cap on the parameters.
Published: 77.27 % on CIFAR-100 where the ensemble of five has 76.87 %.
Differs: the teachers are kdnas's fitted networks; the supernet's loss is the oracle's with the cross-entropy beside it;
lengths, rates and the cap are ours.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.data import cifar100, digits
from kdnas.distillers import FromTeacher, SinglePath
from kdnas.losses import Oracle
from kdnas.scorers import Accuracy
from kdnas.searchers import Controller
from kdnas.settings import Retrain, Search, Train

SYSTEM = "only a teacher that is right teaches, else the label"
ORACLE = ((1.0, spec(Oracle)),)


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("kdas_resnet32"),
            data=spec(cifar100, path=os.environ.get("KDNAS_CIFAR100", "cifar100")),
            distiller=spec(SinglePath, terms=ORACLE),
            recipe=Recipe(steps=60_000, batch_size=128, learning_rate=0.05),
            teacher=FitTeacher(recipe=Recipe(steps=60_000, batch_size=128, learning_rate=0.1), members=5),
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Controller, algorithm="reinforce"),
            budget=Budget(params=6e5),
            num_evaluations=2000,
            num_images=5000,
        ),
        retrain=Retrain(distiller=spec(FromTeacher, terms=ORACLE), recipe=Recipe(steps=80_000, batch_size=128)),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("kdas_digits"),
            data=spec(digits),
            distiller=spec(SinglePath, terms=ORACLE),
            recipe=Recipe(steps=400, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=60, learning_rate=0.1), members=3),
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Controller, algorithm="reinforce"),
            budget=Budget(params=12_000),
            num_evaluations=150,
            num_images=220,
        ),
        retrain=Retrain(distiller=spec(FromTeacher, terms=ORACLE), recipe=Recipe(steps=300, learning_rate=0.1)),
    )
