"""TGSA: a single-path supernet, ranked by representational similarity to the teacher.

Bashivan, Tensen, DiCarlo, Teacher Guided Architecture Search, ICCV 2019.

KDNAS_IMAGENET=PATH kdnas run --experiment tgsa --out runs/tgsa   # 224x224; PATH holds train/CLASS/* and val/CLASS/*
kdnas run --experiment tgsa:small --out runs/tgsa                 # digits, a minute or two on two CPU cores

Differs: the paper trains every candidate for a few epochs and scores it by P + TG; here a shared supernet gives the
weights, which is what makes thousands of candidates affordable, and the score is TG alone.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import SinglePath
from kdnas.scorers import Rdm
from kdnas.settings import Retrain, Search, Train

SYSTEM = "uniform single paths, evolution on similarity to the teacher"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("spos"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(SinglePath, label_smoothing=0.1),
            recipe=Recipe(steps=150_000, batch_size=1024, learning_rate=0.5, weight_decay=4e-5),
        ),
        search=Search(scorer=spec(Rdm), budget=Budget(macs=330e6), num_evaluations=1000, num_images=1024),
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
        search=Search(scorer=spec(Rdm), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
