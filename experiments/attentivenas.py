"""AttentiveNAS: a sandwich whose random children are the best of three candidates of one cost.

Wang, Li, Gong, Chandra, AttentiveNAS: Improving Neural Architecture Search via Attentive Sampling, CVPR 2021.

KDNAS_IMAGENET=PATH kdnas train attentivenas --out runs/attentivenas
kdnas train attentivenas:small --out runs/attentivenas
kdnas search runs/attentivenas && kdnas export runs/attentivenas --place 1

The first command is the published size (PATH holds train/CLASS/* and val/CLASS/*), the second digits, in a minute
or two on two CPU cores.

As published: BestUp-3 by the loss on the step's images, bins of 25 M; 360 epochs of 2,048 images, rate 0.8, decay 1e-5,
warm-up of 5 epochs, cosine to zero, label smoothing 0.1.
Differs: the gradient is clipped by its norm, at 5, instead of value by value, at 1.
"""

import dataclasses
import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import Attentive, Sandwich
from kdnas.scorers import Accuracy
from kdnas.searchers import Evolution
from kdnas.settings import Retrain, Search, Train

SOFT = spec("kdnas.losses.response.soft_targets:SoftTargets", form="soft_cross_entropy", temperature=1.0)

SYSTEM = "sandwich rule on the best or worst of a few draws"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("alphanet"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=288),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(
                Attentive,
                inner=spec(Sandwich, soft=SOFT, terms=(), label_smoothing=0.1),
                bin_macs=25e6,
                num_sampled=20_000,
            ),
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
            distiller=spec(Attentive, inner=spec(Sandwich, soft=SOFT, terms=(), label_smoothing=0.1)),
            recipe=Recipe(steps=200, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(weights="inherited", recipe=Recipe(steps=100, learning_rate=0.02)),
    )
