"""AdaNAS: an ensemble grown subnet by subnet, each taught by the ensemble before it.

Macko et al., Improving Neural Architecture Search Image Classifiers via Ensemble Learning, 2019.

KDNAS_CIFAR10=PATH kdnas grow adanas --out runs/adanas     # full size: CIFAR-10, ten members
kdnas grow adanas:small --out runs/adanas                  # digits, about two minutes on two CPU cores

As published: candidates deeper and wider, adaptive distillation with weight 1 at temperature 1, label smoothing 0.1,
uniform weights, ten members. Published: errors of 2.26 % on CIFAR-10 and 14.58 % on CIFAR-100.
Differs: residual networks for NASNet-A cells; lengths and rates are ours.
"""

import os

from kdnas import Recipe, load_space, spec
from kdnas.data import cifar10, digits
from kdnas.settings import Grow

SYSTEM = "an ensemble grown member by member, each taught by those before it"


def experiment() -> Grow:
    return Grow(
        space=load_space("elastic_resnet"),
        data=spec(cifar10, path=os.environ.get("KDNAS_CIFAR10", "cifar10")),
        recipe=Recipe(steps=80_000, batch_size=128, learning_rate=0.025),
        num_members=10,
    )


def small() -> Grow:
    return Grow(space=load_space("digits"), data=spec(digits), recipe=Recipe(steps=200, learning_rate=0.1))
