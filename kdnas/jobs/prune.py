"""Structured pruning to a student: scale factors trained under the teacher, removal, retraining."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.conversion.base import Conversion
from kdnas.conversion.convert import convert
from kdnas.conversion.scale_factors import Factors
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy, student_hits
from kdnas.jobs._run import build_teacher
from kdnas.jobs.chain import say, teacher_row
from kdnas.jobs.convert import load_source
from kdnas.jobs.fit import fit_teacher
from kdnas.jobs.retrain import retrain
from kdnas.network import Network, default_device
from kdnas.randomness import initialised, torch_rng
from kdnas.report import write_report
from kdnas.runs.folder import STUDENTS, TEACHER, RunFolder
from kdnas.settings import FitTeacher, Prune
from kdnas.spaces.converted import Converted
from kdnas.specs import Spec, spec
from kdnas.statistics import compare_accuracy
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.tables import unstructure
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training

FACTORS = "factors.safetensors"
_CONTROLS = {
    "control": ("the same network retrained without a teacher", "distillation did not help"),
    "random": (
        "random channels and blocks removed to the same cost, retrained alike",
        "the factors chose no better than chance",
    ),
}


class _Plain(nn.Module):
    """A kdnas network as a module that gives logits alone, for the tracer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        x = self.network.stem(x)
        for stage in self.network.stages:
            x = stage(x)
        return self.network.head(x)


class _Folded(nn.Module):
    """A network with its factors in place."""

    def __init__(self, network: Network, factors: Factors) -> None:
        super().__init__()
        self.network, self.factors = network, factors

    def forward(self, images: Tensor) -> Tensor:
        return self.factors.outputs(self.network, images).logits


def prune(settings: Prune, folder: Path) -> dict[str, Any]:
    """Train factors under the teacher, remove to the budget, retrain with and without the teacher; resumable.

    The folder holds `students/pruned` (the factors folded in, not yet retrained), `students/student`, the controls
    `students/control` (the same network, labels alone) and `students/random` (random channels and blocks removed to
    the same budget, retrained alike), and a report.

    Returns:
        Accuracy on the test part, params, MACs and seconds of the student, its folder, and a row per control.

    Raises:
        ValueError: the folder holds something else, the source cannot be converted or has other classes, or the budget
            cannot be met.

    Reference: Gu, Tresp, Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612).
    Differs: see `Factors`; to meet the budget the smallest factors are removed, zeros first.
    """
    storage = RunFolder.create(folder, settings.to_json(), settings.recipe.seed)
    data: Data = settings.data.build(Data)
    # A source that does not fit is refused before anything is trained.
    conversion = None if settings.source == "teacher" else _convert_source(settings, storage, data)
    teacher = settings.teacher
    teacher_spec = fit_teacher(teacher, data, storage) if isinstance(teacher, FitTeacher) else teacher
    conversion = conversion or _convert_source(settings, storage, data)
    if all(row["name"] != "teacher" for row in storage.results()["rows"]):
        storage.record_result({"name": "teacher", **teacher_row(build_teacher(teacher_spec, data), data)})
    if storage.phase("removal") is None:
        _remove(settings, storage, data, teacher_spec, conversion)
    rows = _retrain(settings, storage, teacher_spec)
    hits = {name: student_hits(storage.path(STUDENTS, name), data) for name in rows}
    storage.record_controls(
        {name: compare_accuracy("student", hits["student"], hits[name], *words) for name, words in _CONTROLS.items()}
    )
    write_report(storage.folder)
    controls = {name: rows[name] for name in _CONTROLS}
    return {"student": str(storage.path(STUDENTS, "student")), **rows["student"], "controls": controls}


def _convert_source(settings: Prune, storage: RunFolder, data: Data) -> Conversion:
    """The network to begin with, as a space of its sub-networks.

    Raises:
        ValueError: it has other classes than the data, or no channels to remove.
    """
    kind, _, rest = settings.source.partition(":")
    if settings.source == "teacher" or kind == "checkpoint":
        network, _ = read_student(storage.path(TEACHER) if settings.source == "teacher" else Path(rest))
        source: nn.Module = _Plain(network)
    else:
        load = partial(load_source, settings.source, size=data.image[1], classes=data.classes)
        source = initialised(load, settings.recipe.seed)  # fresh weights, where it has no others
    conversion = convert(source, image=data.image, needs_choices=False)
    if conversion.space.classes != data.classes:
        raise ValueError(
            f"the source {settings.source} has {conversion.space.classes} classes, the data {data.classes}. Use a "
            "network of this data's classes."
        )
    if not isinstance(conversion.space, Converted):
        raise ValueError(
            f"scale factors act on channels of convolutions, but the source {settings.source} is a vision transformer. "
            "Make it elastic with `kdnas convert` and search its subnets."
        )
    return conversion


def _remove(settings: Prune, storage: RunFolder, data: Data, teacher_spec: Spec, conversion: Conversion) -> None:
    """Train network and factors, remove to the budget, and write the result; and a random removal to its cost."""
    space = conversion.space
    assert isinstance(space, Converted)
    network = conversion.supernet.extract(space.largest)
    whole = cost(network.blueprint)
    factors = Factors(space, penalty=settings.penalty, budget=settings.budget, by_cost=settings.by_cost)
    if settings.penalty is None and settings.budget.admits(whole):
        raise ValueError(
            f"the network has {whole.params:,} params and {whole.macs:,} MACs, within {settings.budget}, so there is "
            "nothing to remove. Lower the budget, or begin with a larger network."
        )
    factors.within(settings.budget)  # refuses a budget that cannot be met before anything is trained
    training = Training(network, factors, data, build_teacher(teacher_spec, data), settings.recipe, default_device())
    watch = lambda: {"accuracy": accuracy(_Folded(network, factors), data.search, data)}  # noqa: E731
    train_with_checkpoints(training, "factors", storage.path(FACTORS), storage, watch)
    network, factors = network.cpu().eval(), factors.cpu()
    zeros = sum(int((f.detach() == 0).sum()) for f in factors.factors.values())
    pruned = factors.removed(network, factors.within(settings.budget)).eval()
    left = cost(pruned.blueprint)
    origin = {"data": settings.data.to_json(), "teacher": teacher_spec.to_json()}
    origin |= {"recipe": unstructure(settings.retrain.recipe)}
    facts = {"zero factors": zeros, "whole": whole._asdict()}
    _write(storage.path(STUDENTS, "pruned"), pruned, data, origin | facts)
    say(f"prune: {zeros} factors are 0; {left.params:,} params and {left.macs:,} MACs are left of {whole.macs:,}")
    random = _remove_randomly(network, factors, left.macs, settings.recipe.seed)
    _write(storage.path(STUDENTS, "drawn"), random, data, origin | {"control": "random"})
    before = accuracy(pruned.to(default_device()), data.test, data)
    count = sum(f.numel() for f in factors.factors.values())
    facts = {"zeros": zeros, "factors": count, "whole": whole._asdict(), "left": left._asdict()}
    storage.finish("removal", **facts, budget=settings.budget.bounds(), accuracy=before)


def _remove_randomly(network: Network, factors: Factors, macs: int, seed: int) -> Network:
    """The network after random channels and blocks are removed to a number of MACs; factors become 1."""
    rng = torch_rng("random removal", seed)
    with torch.no_grad():
        for value in factors.factors.values():
            value.copy_(torch.rand(value.shape, generator=rng) + 1)
        channels = factors.within(Budget(macs=macs, params=None))
        for value in factors.factors.values():
            value.fill_(1.0)
    return factors.removed(network, channels).eval()


def _retrain(settings: Prune, storage: RunFolder, teacher_spec: Spec) -> dict[str, dict[str, Any]]:
    """Retrain the student and its controls, and record their rows of the closing table."""
    pruned, rows = storage.path(STUDENTS, "pruned"), {}
    plans = {
        "student": (pruned, settings.retrain),
        "control": (pruned, dataclasses.replace(settings.retrain, distiller=spec(FromLabels))),
        "random": (storage.path(STUDENTS, "drawn"), settings.retrain),
    }
    for name, (source, recipe) in plans.items():
        if storage.phase(name) is None:
            out = storage.path(STUDENTS, name)
            options = {"data": settings.data, "teacher": teacher_spec, "deploy": name == "student"}
            result = retrain(source, recipe, out, phase=name, **options)
            row = {key: result[key] for key in ("accuracy", "params", "macs", "seconds")}
            storage.record_result({"name": name, **row})
            storage.finish(name, **row)
        rows[name] = storage.require(name, "kdnas prune")
    return rows


def _write(folder: Path, network: Network, data: Data, origin: dict[str, Any]) -> None:
    write_student(folder, network, Card.of(network, data, origin), deploy=False)
