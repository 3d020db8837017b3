"""NAS-Bench-Macro on CIFAR-10: a single-path supernet under a teacher, for measuring how well scores rank.

Su et al., Prioritized Architecture Sampling with Monto-Carlo Tree Search, CVPR 2021 (the benchmark).

KDNAS_CIFAR10=PATH kdnas train nas_bench_macro --out runs/macro          # 32x32, full width: hours on one GPU
KDNAS_CIFAR10=PATH kdnas train nas_bench_macro:small --out runs/macro    # 16x16, half width: about half an hour
kdnas rank-check runs/macro TABLE.csv                                    # TABLE.csv: columns arch, mean_acc

PATH is the folder of the binary files, or an .npz of JPEG bytes (see `kdnas.data.cifar.cifar10`). The codes are the
benchmark's own at either size. `early` is `small` stopped after one epoch, `initial` before the first; both want
the teacher that `small` trained: KDNAS_TEACHER=checkpoint:runs/macro/teacher. `labels` is `small` without the teacher
in the supernet's loss, from another seed.
"""

import dataclasses
import os

from kdnas import Experiment, FitTeacher, Recipe, load_space, load_teacher, spec
from kdnas.data import cifar10
from kdnas.distillers import SinglePath
from kdnas.settings import Retrain, Search, Train
from kdnas.specs import Spec

TERMS = ((1.0, spec("kdnas.losses.response.soft_targets:SoftTargets", temperature=1.0)),)


def experiment() -> Experiment:
    recipe = Recipe(steps=42_000, batch_size=128, learning_rate=0.1)
    return Experiment(
        train=Train(
            space=load_space("nas_bench_macro"),
            data=spec(cifar10, path=_path()),
            distiller=spec(SinglePath, terms=TERMS),
            recipe=recipe,
            teacher=_teacher(Recipe(steps=35_000, batch_size=128, learning_rate=0.1)),
        ),
        search=Search(num_evaluations=1000, num_images=512),
        retrain=Retrain(recipe=recipe),
    )


def small() -> Experiment:
    full = experiment()
    space = dataclasses.replace(full.train.space, width_multiplier=0.5, resolutions=(16,))
    train = dataclasses.replace(
        full.train,
        space=space,
        data=spec(cifar10, path=_path(), size=16),
        recipe=Recipe(steps=5270, batch_size=128, learning_rate=0.1),
        teacher=_teacher(Recipe(steps=1500, batch_size=128, learning_rate=0.1)),
    )
    return dataclasses.replace(full, train=train)


def labels() -> Experiment:
    """`small` without the teacher in the supernet's loss, from another seed."""
    base = small()
    recipe = dataclasses.replace(base.train.recipe, seed=1)
    return dataclasses.replace(base, train=dataclasses.replace(base.train, distiller=spec(SinglePath), recipe=recipe))


def early() -> Experiment:
    base = small()
    return dataclasses.replace(base, train=dataclasses.replace(base.train, recipe=Recipe(steps=351, learning_rate=0.1)))


def initial() -> Experiment:
    base = small()
    # One step at a vanishing rate: a run must be trained to be searched.
    return dataclasses.replace(base, train=dataclasses.replace(base.train, recipe=Recipe(steps=1, learning_rate=1e-9)))


def _teacher(recipe: Recipe) -> Spec | FitTeacher:
    teacher = load_teacher(os.environ.get("KDNAS_TEACHER", "fit"))
    return FitTeacher(recipe=recipe) if isinstance(teacher, FitTeacher) else teacher


def _path() -> str:
    path = os.environ.get("KDNAS_CIFAR10")
    if path is None:
        raise ValueError("this experiment reads CIFAR-10. Set KDNAS_CIFAR10 to its folder or .npz.")
    return path
