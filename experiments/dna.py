"""DNA: every stage of the supernet imitates the teacher's; every path of every block is rated, the best found exactly.

Li et al., Block-wisely Supervised Neural Architecture Search with Knowledge Distillation, CVPR 2020.

KDNAS_IMAGENET=PATH kdnas train dna --out runs/dna        # published size; PATH holds train/CLASS/* and val/CLASS/*
kdnas search runs/dna && kdnas export runs/dna --place 1
kdnas run --experiment dna:small --out runs/dna           # digits, a minute or two on two CPU cores

As published: EfficientNet-B7 as teacher, six blocks one after the other, 20 epochs each, batches of 512; 350 M (DNA-a).
Differs: one learning rate for all blocks (published: 0.002 to 0.005 per block, a tenth less each epoch) on one cosine;
weight decay as in AdamW; batch statistics while rating. `small` trains all blocks at once, from cached teacher outputs.
"""

import os

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.data import digits, folder
from kdnas.distillers import BlockWise
from kdnas.scorers import Blocks
from kdnas.settings import Retrain, Search, Train
from kdnas.spaces import MBConvSpace, Stage, Stem
from kdnas.teachers import zoo_teacher

# Where the released supernet is cut: the teacher's widths 48, 80, 160, 224, 384 and 640.
STAGES = tuple(f"features.{index}" for index in range(2, 8))

SYSTEM = "blocks taught by the teacher's features, exact search"


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("dna"),
            data=spec(folder, path=os.environ.get("KDNAS_IMAGENET", "imagenet"), size=224),
            teacher=spec(zoo_teacher, zoo="torchvision", name="efficientnet_b7", weights="", stages=STAGES),
            distiller=spec(BlockWise, schedule="one_by_one"),
            recipe=Recipe(steps=300_000, batch_size=512, optimizer="adamw", learning_rate=0.005, clip=0.0),
        ),
        search=Search(scorer=spec(Blocks), budget=Budget(macs=350e6), num_evaluations=100, num_images=1216, exact=True),
        retrain=Retrain(recipe=Recipe(steps=625_000, batch_size=512, learning_rate=0.2, weight_decay=1e-5)),
    )


def small() -> Experiment:
    operations = {"kernel": (3, 5), "expansion": (2, 3)}
    space = MBConvSpace(
        name="dna_digits",
        image_channels=1,
        resolutions=(8,),
        per="block",
        shared=False,
        activation="swish",
        stem=Stem(width=(8,), stride=1),
        stages=(
            Stage(width=(16,), depth=(1, 2), **operations),
            Stage(width=(24,), depth=(1, 2), stride=2, **operations),
            Stage(width=(40,), depth=(1, 2), stride=2, **operations),
        ),
    )
    return Experiment(
        train=Train(
            space=space,
            data=spec(digits),
            distiller=spec(BlockWise),
            recipe=Recipe(steps=400, optimizer="adamw", learning_rate=0.005, clip=0.0),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
            teacher_views=4,
        ),
        search=Search(scorer=spec(Blocks), budget=Budget(macs=2.5e5), num_evaluations=150, num_images=220, exact=True),
        retrain=Retrain(recipe=Recipe(steps=250, learning_rate=0.1)),
    )
