"""SPOS: uniform single-path training of the ShuffleNet-like space, then evolution on inherited weights.

Guo et al., Single Path One-Shot Neural Architecture Search with Uniform Sampling, ECCV 2020.

KDNAS_IMAGENET=PATH kdnas train spos --out runs/spos      # published size; PATH holds train/CLASS/* and val/CLASS/*
kdnas train spos:small --out runs/spos                    # digits, a minute or two on two CPU cores
kdnas search runs/spos && kdnas export runs/spos --place 1

As published: 150,000 steps of 1,024 images, rate 0.5, decay 4e-5, label smoothing 0.1; at most 330 M; 20 rounds of 50.
Differs: cosine for linear decay; batch norms have scale and shift; the chosen network is retrained under ResNet-50.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import SinglePath
from kdnas.scorers import Accuracy
from kdnas.searchers import Evolution
from kdnas.settings import Retrain, Search, Train

SYSTEM = "uniform single paths, evolution on inherited accuracy"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("spos"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(SinglePath, label_smoothing=0.1),
            recipe=Recipe(steps=150_000, batch_size=1024, learning_rate=0.5, weight_decay=4e-5),
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Evolution, population=50, batch=50),
            budget=Budget(macs=330e6),
            num_evaluations=1000,
            num_images=8000,
        ),
        retrain=Retrain(recipe=Recipe(steps=300_000, batch_size=1024, learning_rate=0.5, weight_decay=4e-5)),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=spec(SinglePath, label_smoothing=0.1),
            recipe=Recipe(steps=300, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
