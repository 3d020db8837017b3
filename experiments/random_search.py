"""Random search: the control of every system. Drawn networks are trained for a short while under the teacher.

Li and Talwalkar, Random Search and Reproducibility for Neural Architecture Search, UAI 2019.

KDNAS_IMAGENET=PATH kdnas run --experiment random_search --out runs/random   # 224x224, 100 networks
kdnas run --experiment random_search:small --out runs/random                 # digits, a minute on two CPU cores
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.scorers import ShortTraining
from kdnas.searchers import RandomSearch
from kdnas.settings import Retrain, Search, Train

SYSTEM = "random networks, each trained for a short while under the teacher"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("spos"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=None,
        ),
        search=Search(
            scorer=spec(ShortTraining, steps=5000, batch_size=256),
            searcher=spec(RandomSearch),
            budget=Budget(macs=330e6),
            num_evaluations=100,
            num_images=1024,
            control=False,
        ),
        retrain=Retrain(recipe=Recipe(steps=300_000, batch_size=1024, learning_rate=0.5, weight_decay=4e-5)),
    )


def small() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=None,
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(
            scorer=spec(ShortTraining, steps=30),
            searcher=spec(RandomSearch),
            budget=Budget(macs=6e5),
            num_evaluations=50,
            num_images=220,
            control=False,
        ),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
