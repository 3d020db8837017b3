"""BigNAS: the sandwich rule with in-place distillation, zero-gamma start and a constant ending.

Yu et al., BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage Models, ECCV 2020.

KDNAS_IMAGENET=PATH kdnas train bignas --out runs/bignas
kdnas train bignas:small --out runs/bignas
kdnas search runs/bignas && kdnas export runs/bignas --place 1

The first command is the published size (PATH holds train/CLASS/* and val/CLASS/*), the second digits, in a minute
or two on two CPU cores.

Largest, smallest and two random children per step; the children learn from the largest's soft labels alone, which
alone is regularised; batches of 4,096; the rate ends at 5 % of its peak; the space starts each shortcut block as
its shortcut.
Differs: SGD at AttentiveNAS's rate, scaled with the batch, for RMSProp at 0.256; cosine for steps of 0.97; decay on
the shared weights.
"""

import dataclasses
import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import digits, folder
from kdnas.distillers import Sandwich
from kdnas.scorers import Accuracy
from kdnas.searchers import Evolution
from kdnas.settings import Retrain, Search, Train

SOFT = spec("kdnas.losses.response.soft_targets:SoftTargets", form="soft_cross_entropy", temperature=1.0)

SYSTEM = "sandwich rule with in-place distillation"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("bignas"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=320),
            teacher=load_teacher("torchvision:resnet50"),
            distiller=spec(Sandwich, soft=SOFT, terms=(), label_smoothing=0.1),
            recipe=Recipe(steps=112_600, batch_size=4096, learning_rate=1.6, weight_decay=1e-5, floor=0.05),
        ),
        search=Search(
            scorer=spec(Accuracy),
            searcher=spec(Evolution, population=128, batch=64),
            budget=Budget(macs=600e6),
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
            distiller=spec(Sandwich, soft=SOFT, terms=(), label_smoothing=0.1),
            recipe=Recipe(steps=250, learning_rate=0.1, floor=0.05),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        search=Search(scorer=spec(Accuracy), budget=Budget(macs=6e5), num_evaluations=150, num_images=220),
        retrain=Retrain(weights="inherited", recipe=Recipe(steps=100, learning_rate=0.02)),
    )
