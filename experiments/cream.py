"""Cream of the Crop: the best paths found so far teach the path that is trained; a matcher picks the one that fits.

Peng et al., Cream of the Crop: Distilling Prioritized Paths for One-Shot Neural Architecture Search, NeurIPS 2020.

KDNAS_IMAGENET=PATH kdnas train cream --out runs/cream    # published size; PATH holds train/CLASS/* and val/CLASS/*
kdnas train cream:small --out runs/cream                  # digits, a minute or two on two CPU cores
kdnas search runs/cream && kdnas export runs/cream --place 1

As published: 120 epochs of batches of 1,024 at rate 1.0, 20 of them before distillation begins; a board of 10, slices
of 4 images, the matcher's step every 200 at 1e-4; label smoothing 0.1; at most 300 M.
Differs: cosine for linear decay; the network is found by evolution on inherited weights, while the paper reads it off
the board; it is retrained under ResNet-50.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import Prioritized
from kdnas.scorers import Accuracy
from kdnas.settings import Retrain, Search, Train

SYSTEM = "prioritized paths teach the others, by a meta matcher"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("cream"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(Prioritized, look_ahead=1.0, label_smoothing=0.1),
            recipe=Recipe(steps=150_000, batch_size=1024, learning_rate=1.0, weight_decay=1e-4),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=300e6), num_evaluations=1000, num_images=8000),
        retrain=Retrain(recipe=Recipe(steps=625_000, batch_size=1024, learning_rate=0.5, weight_decay=1e-5)),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=spec(Prioritized, every=20, meta_rate=0.1, look_ahead=0.1, label_smoothing=0.1),
            recipe=Recipe(steps=300, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
