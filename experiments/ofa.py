"""Once-for-all: progressive shrinking with kernel transforms and channel sorting; subnets need no retraining.

Cai, Gan, Wang, Zhang, Han, Once-for-All: Train One Network and Specialize it for Efficient Deployment, ICLR 2020.

KDNAS_IMAGENET=PATH kdnas train ofa --out runs/ofa      # published size; PATH holds train/CLASS/* and val/CLASS/*
kdnas train ofa:small --out runs/ofa                    # digits, a minute or two on two CPU cores
kdnas search runs/ofa && kdnas export runs/ofa --place 1

As published: epochs per stage 180 (full), 125 (kernel), 25 and 125 (depth), 25 and 125 (width) of 2,048 images; decay
3e-5, label smoothing 0.1; a specialised network is fine-tuned for 25 epochs.
Differs: one cosine over all stages; the published rate is 0.96 for kernels, 0.08 and 0.24 later.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import Progressive
from kdnas.scorers import Accuracy
from kdnas.searchers import Evolution
from kdnas.settings import Retrain, Search, Train
from kdnas.sharing import KernelTransform

SYSTEM = "progressive shrinking, evolution on inherited accuracy"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("ofa_mbv3"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(Progressive, label_smoothing=0.1),
            share=spec(KernelTransform),
            recipe=Recipe(steps=378_000, batch_size=2048, learning_rate=0.96, weight_decay=3e-5),
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Evolution, population=100, batch=75),
            budget=Budget(macs=230e6),
            num_evaluations=4000,
            num_images=8000,
        ),
        retrain=Retrain(
            weights="inherited",
            recipe=Recipe(steps=15_600, batch_size=2048, learning_rate=2.4e-2, weight_decay=3e-5),
        ),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=spec(Progressive, label_smoothing=0.1),
            share=spec(KernelTransform),
            recipe=Recipe(steps=300, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(weights="inherited", recipe=Recipe(steps=100, learning_rate=0.02)),
    )
