"""Small data and an experiment on the toy space, importable by name from a command line."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from kdnas.costs.budget import Budget
from kdnas.data.base import Data, TensorImages
from kdnas.randomness import initialised, torch_rng
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment, FitTeacher, Prune, Recipe, Retrain, Search, Train
from kdnas.specs import spec
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.teachers.load import load_teacher


def part(count: int, name: str, classes: int = 3) -> TensorImages:
    labels = torch.arange(count) % classes
    noise = torch.rand(count, 3, 8, 8, generator=torch_rng(name)) * 0.6
    for label in range(classes):
        noise[labels == label, label % 3, label : label + 3] += 0.4
    return TensorImages(noise, labels)


def data() -> Data:
    return Data(part(48, "train"), part(30, "search"), part(30, "test"), class_names=("a", "b", "c"))


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("toy"),
            data=spec("tests.toy:data"),
            recipe=Recipe(steps=12, batch_size=16, learning_rate=0.05),
            teacher=FitTeacher(recipe=Recipe(steps=3, batch_size=16, learning_rate=0.05)),
        ),
        search=Search(budget=Budget(macs=70_000), num_evaluations=12, num_images=30),
        retrain=Retrain(recipe=Recipe(steps=3, batch_size=16, learning_rate=0.05)),
    )


class Cnn(nn.Module):
    def __init__(self, classes: int = 3, width: int = 12) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(6, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


def cnn() -> nn.Module:
    return Cnn()


def steady_cnn() -> nn.Module:
    """The same weights every time."""
    return initialised(Cnn, 0)


def far_cnn() -> Frozen:
    """It normalises images otherwise than the data."""
    own = dataclasses.replace(data().preprocessing, mean=(0.1, 0.2, 0.3), std=(2.0, 2.0, 2.0))
    return Frozen(steady_cnn(), preprocessing=own)


def narrow_cnn() -> nn.Module:
    """No width of it has a second option."""
    return Cnn(width=8)


def other_classes() -> nn.Module:
    return Cnn(7)


def alone() -> Experiment:
    """Without a supernet: every candidate is trained by itself."""
    base = experiment()
    short = spec("kdnas.scorers.short_training:ShortTraining", steps=2, batch_size=16)
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, distiller=None),
        search=dataclasses.replace(base.search, scorer=short, num_evaluations=5),
    )


def oracle() -> Experiment:
    """Three teachers, of which those that are right teach."""
    base = experiment()
    distiller = spec(
        "kdnas.distillers.single_path:SinglePath", terms=((1.0, spec("kdnas.losses.response.oracle:Oracle")),)
    )
    return dataclasses.replace(
        base,
        train=dataclasses.replace(
            base.train, distiller=distiller, teacher=dataclasses.replace(base.train.teacher, members=3)
        ),
    )


def contrasted() -> Experiment:
    """AKD in small: a controller, and the same search without the teacher beside it."""
    base = alone()
    short = base.search.scorer
    labels = short.replace(distiller=spec("kdnas.distillers.from_labels:FromLabels"))
    controller = spec("kdnas.searchers.controller:Controller", batch=3)
    return dataclasses.replace(
        base, search=dataclasses.replace(base.search, contrast=labels, searcher=controller, num_evaluations=6)
    )


def two_phases() -> Experiment:
    """Multi-fidelity in small: rungs and a pruner first, then whole trainings of the best."""
    base = alone()
    short = base.search.scorer
    first = dataclasses.replace(
        base.search,
        scorer=short.replace(steps=4, num_rungs=3, reduction=2),
        searcher=spec("kdnas.searchers.gaussian_process:GaussianProcess", num_initial=6, batch=2),
        pruner=spec("optuna.pruners:SuccessiveHalvingPruner"),
        num_evaluations=10,
    )
    again = spec("kdnas.searchers.gaussian_process:GaussianProcess", num_initial=4, batch=1)
    second = dataclasses.replace(
        first, scorer=short.replace(steps=6), searcher=again, pruner=None, initial=2, num_evaluations=6
    )
    return dataclasses.replace(base, search=first, second=second)


def pruned_by_factors() -> Prune:
    """Scale factors on the fitted teacher's topology."""
    return dataclasses.replace(pruned(), method="scale_factors")


def pruned() -> Prune:
    """Shares of the fitted teacher's channels."""
    short = Recipe(steps=6, batch_size=16, learning_rate=0.02)
    return Prune(
        data=spec("tests.toy:data"),
        budget=Budget(macs=350_000),
        recipe=short,
        teacher=FitTeacher(recipe=short),
        retrain=Recipe(steps=3, batch_size=16, learning_rate=0.02),
        num_candidates=6,
        num_images=40,
    )


def files_with(folder: Path, *texts: object) -> list[str]:
    """The files below a folder that hold one of these texts, such as a path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    return [path.name for path in files if any(str(text).encode() in path.read_bytes() for text in texts)]


class SealedImages(TensorImages):
    """Images that must not be read, but for the one by which Data knows their shape, before a run has chosen.

    Attributes:
        run: the folder of the run; without one they are sealed for ever.
        phase: in which it records its choice.
        reads: how often they were read since.
    """

    run: Path | None = None
    phase = "finals"
    reads = 0

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        if len(indices) > 1:
            chosen = self.run is not None and RunFolder(self.run).phase(self.phase)
            assert chosen, "the test part was read before the choice"
            SealedImages.reads += 1
        return super().take(indices)

    def digest(self) -> str:
        return "sealed"


def sealed() -> Data:
    plain = data()
    return Data(plain.train, plain.search, SealedImages(plain.test.images, plain.test.labels), plain.class_names)


def by_params() -> Experiment:
    """No supernet and no teacher to be trained; the ranking is by size."""
    base = experiment()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(
            base.train, data=spec("tests.toy:sealed"), teacher=load_teacher("tests.toy:steady_cnn"), distiller=None
        ),
        search=dataclasses.replace(base.search, scorer=spec("kdnas.scorers.params:Params")),
        retrain=Retrain(recipe=Recipe(steps=8, batch_size=16, learning_rate=0.05)),
    )
