"""FairNAS: strict fairness over six inverted residuals per layer, then NSGA-II.

Chu, Zhang, Xu, FairNAS: Rethinking Evaluation Fairness of Weight Sharing Neural Architecture Search, ICCV 2021.

KDNAS_IMAGENET=PATH kdnas train fairnas --out runs/fairnas     # published size; PATH holds train/CLASS/*, val/CLASS/*
kdnas train fairnas:small --out runs/fairnas                   # digits, a minute or two on two CPU cores
kdnas search runs/fairnas && kdnas export runs/fairnas --place 1

As published: 19 layers of six operations, 6^19 networks; 150 epochs of 1,024 images, rate 0.045, decay 4e-5.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import FairPaths
from kdnas.scorers import Accuracy
from kdnas.searchers import Nsga2
from kdnas.settings import Retrain, Search, Train
from kdnas.spaces import Head, MBConvSpace, Stage, Stem

ROWS = ((32, 2, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))  # width, layers, stride

SYSTEM = "strictly fair paths, NSGA-II"


def experiment() -> Experiment:
    choices = {"kernel": (3, 5, 7), "expansion": (3, 6)}
    space = MBConvSpace(
        name="fairnas",
        source="Chu et al., FairNAS, ICCV 2021",
        classes=1000,
        resolutions=(224,),
        per="block",
        shared=False,
        stem=Stem(width=(32,)),
        stages=(
            Stage(width=(16,), expansion=(1,), joins_next=True),
            *(Stage(width=(width,), depth=(depth,), stride=stride, **choices) for width, depth, stride in ROWS),
        ),
        head=Head(kind="mobilenet_v2", width=(1280,)),
    )
    recipe = Recipe(steps=187_000, batch_size=1024, learning_rate=0.045, weight_decay=4e-5)
    return Experiment(
        train=Train(
            space=space,
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(FairPaths),
            recipe=recipe,
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Nsga2, population=70),
            budget=Budget(macs=400e6),
            num_evaluations=10_000,
            num_images=8000,
        ),
        retrain=Retrain(recipe=recipe),
    )


def small() -> Experiment:
    choices = {"kernel": (3, 5), "expansion": (2, 3)}
    space = MBConvSpace(
        name="fair_digits",
        image_channels=1,
        resolutions=(8,),
        per="block",
        shared=False,
        stem=Stem(width=(16,), stride=1),
        stages=tuple(
            Stage(width=(width,), depth=(2,), stride=stride, **choices) for width, stride in ((16, 1), (32, 2))
        ),
    )
    return Experiment(
        train=Train(
            space=space,
            data=spec(digits),
            distiller=spec(FairPaths),
            recipe=Recipe(steps=120, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(
            scorer=spec(Accuracy), searcher=spec(Nsga2), budget=Budget(macs=6e5), num_evaluations=100, num_images=220
        ),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
