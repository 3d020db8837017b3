"""AKD: an LSTM controller, rewarded with what candidates reach in a short training under the teacher.

Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020.

KDNAS_IMAGENET=PATH kdnas run --experiment akd --out runs/akd   # 224x224; PATH holds train/CLASS/* and val/CLASS/*
kdnas run --experiment akd:small --out runs/akd                 # digits, about four minutes on one CPU core

As published: PPO, the reward accuracy * (cost / target)^-0.07 after 5 epochs with distillation. The contrast is the
same search rewarded with what candidates reach without the teacher; random search at equal cost stands beside both.
Differs: the target is in multiply-accumulates, the paper's in milliseconds on a telephone (`cost="latency"` measures
this machine); the teacher is a ResNet-50, not an Inception-ResNet-v2; the number of candidates and all rates are ours.
"""

import os

from kdnas import Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import FromLabels
from kdnas.scorers import Reward, ShortTraining
from kdnas.searchers import Controller
from kdnas.settings import Retrain, Search, Train

SYSTEM = "an LSTM controller rewarded with accuracy after a short training under the teacher"


def experiment() -> Experiment:
    short = {"steps": 25_000, "batch_size": 256}
    return Experiment(
        train=Train(
            space=load_space("ofa_mbv3"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=None,
        ),
        search=Search(
            scorer=spec(Reward, scorer=spec(ShortTraining, **short), target=300e6),
            contrast=spec(Reward, scorer=spec(ShortTraining, distiller=spec(FromLabels), **short), target=300e6),
            searcher=spec(Controller, batch=16),
            num_evaluations=2000,
            num_images=10_000,
        ),
        retrain=Retrain(recipe=Recipe(steps=500_000, batch_size=256, learning_rate=0.1, weight_decay=4e-5)),
    )


def small() -> Experiment:
    short = {"steps": 25, "batch_size": 64}
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            distiller=None,
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(
            scorer=spec(Reward, scorer=spec(ShortTraining, **short), target=4e5),
            contrast=spec(Reward, scorer=spec(ShortTraining, distiller=spec(FromLabels), **short), target=4e5),
            searcher=spec(Controller, learning_rate=0.01),
            num_evaluations=64,
            num_images=220,
        ),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
