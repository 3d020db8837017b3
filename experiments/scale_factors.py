"""Search for better students: a teacher's topology, pruned by scale factors under its divergence, then retrained.

Gu and Tresp, Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612).

KDNAS_CIFAR10=PATH kdnas prune scale_factors --out runs/pruned   # full size: CIFAR-10
kdnas prune scale_factors:small --out runs/pruned                # digits, two minutes on two CPU cores

As published: the teacher's topology, one factor per channel and block, divergence and a cost-weighted L1 with a
proximal step, removal, retraining by distillation. Ours are the penalty, which grows until the budget is met, lengths
and rates, and the fitted teacher.
"""

import os

from kdnas import Budget, FitTeacher, Recipe, spec
from kdnas.data import cifar10, digits
from kdnas.settings import Prune

SYSTEM = "scale factors on the teacher's topology, structured removal to the budget"


def experiment() -> Prune:
    return Prune(
        data=spec(cifar10, path=os.environ.get("KDNAS_CIFAR10", "cifar10")),
        budget=Budget(macs=60e6),
        method="scale_factors",
        by_cost=True,
        as_published=True,
        recipe=Recipe(steps=20_000, learning_rate=0.02),
        teacher=FitTeacher(recipe=Recipe(steps=35_000, learning_rate=0.1)),
        retrain=Recipe(steps=40_000, learning_rate=0.05),
    )


def small() -> Prune:
    return Prune(
        data=spec(digits),
        budget=Budget(macs=1e6),
        method="scale_factors",
        by_cost=True,
        as_published=True,
        recipe=Recipe(steps=400, learning_rate=0.05),
        teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        retrain=Recipe(steps=150, learning_rate=0.02),
    )
