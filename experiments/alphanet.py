"""AlphaNet: a sandwich under the adaptive alpha-divergence.

Wang, Gong, Li, Liu, Chandra, AlphaNet: Improved Training of Supernets with Alpha-Divergence, ICML 2021.

KDNAS_IMAGENET=PATH kdnas train alphanet --out runs/alphanet
kdnas train alphanet:small --out runs/alphanet
kdnas search runs/alphanet && kdnas export runs/alphanet --place 1

The first command is the published size (PATH holds train/CLASS/* and val/CLASS/*), the second digits, in a minute
or two on two CPU cores.

As published: alpha -1 and 1, ratios clipped at 5, uniform children; 360 epochs of 2,048 images, rate 0.8, decay 1e-5,
warm-up of 5 epochs, cosine to zero, label smoothing 0.1.
Differs: the gradient is clipped by its norm, at 5, instead of value by value, at 1.
"""

import dataclasses
import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import Sandwich
from kdnas.scorers import Accuracy
from kdnas.searchers import Evolution
from kdnas.settings import Retrain, Search, Train

SYSTEM = "sandwich rule with the adaptive alpha-divergence"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("alphanet"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=288),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(Sandwich, terms=(), label_smoothing=0.1),
            recipe=Recipe(steps=225_200, batch_size=2048, learning_rate=0.8, weight_decay=1e-5, warmup=5 / 360),
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Evolution, population=128, batch=64),
            budget=Budget(macs=500e6),
            num_evaluations=5000,
            num_images=8000,
        ),
        # A subnet is deployed as it is; a short training under the teacher stands for the chain's last step.
        retrain=Retrain(
            weights="inherited", recipe=Recipe(steps=15_600, batch_size=2048, learning_rate=2e-2, weight_decay=1e-5)
        ),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=dataclasses.replace(load_space("digits"), zero_gamma=True),
            data=spec(digits),
            distiller=spec(Sandwich, terms=(), label_smoothing=0.1),
            recipe=Recipe(steps=250, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(weights="inherited", recipe=Recipe(steps=100, learning_rate=0.02)),
    )
