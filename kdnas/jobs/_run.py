"""A run's parts, built from its manifest when first asked for."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import final

import torch

from kdnas.data.base import Data, changes
from kdnas.distillers.base import Distiller
from kdnas.evaluation import measure_of
from kdnas.network import Network, channels_last, default_device, load_strictly
from kdnas.randomness import initialised, torch_rng
from kdnas.ranking.order import ranked
from kdnas.ranking.table import Ranking
from kdnas.runs.checkpoint import part_of
from kdnas.runs.folder import CHECKPOINT, MANIFEST, MEMBERS, REPORT, SNAPSHOTS, TEACHER, RunFolder
from kdnas.runs.places import check_places
from kdnas.scorers.base import BlockRater, Evidence, Scorer
from kdnas.settings import Experiment, FitTeacher, Train
from kdnas.space import SearchSpace
from kdnas.specs import Spec, resolve, spec
from kdnas.supernet import Supernet, corner
from kdnas.tasks.base import Task
from kdnas.teachers.base import Teacher, teacher_of
from kdnas.teachers.combined import several_teachers
from kdnas.teachers.zoo import load_weights, student_teacher
from kdnas.training.loop import Training
from kdnas.trust import trusting

_log = logging.getLogger(__name__)
_INSISTS: ContextVar[bool] = ContextVar("insists", default=False)


@final
class Run:
    """A run folder with its experiment, data, teacher, supernet and ranking, each made when first used.

    Args:
        folder: the run folder.
        trust: build what it names, where that is not kdnas's own.

    Raises:
        Untrusted: it names such code; see `kdnas.trust.admit`.
        ValueError: the folder is no run.

    Example:
        >>> Run("no/such/folder")
        Traceback (most recent call last):
        ValueError: there is no run no/such/folder. Make one with `kdnas run` or `kdnas train`.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False) -> None:
        with trusting(trust):
            self.storage = RunFolder(Path(folder))

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self.storage.folder

    def ranking(self, search: int | None = None) -> Ranking:
        """The candidates of a search, best first.

        Args:
            search: its 1-based number in the run; by default the last finished one.

        Raises:
            ValueError: no search is finished.
        """
        number = search or self.storage.require("search", f"kdnas search {self.folder}")["search"]
        return Ranking(ranked([entry for entry in self.storage.ranking(number) if not entry.is_control]))

    def __str__(self) -> str:
        return closing_table(self.storage)

    @cached_property
    def experiment(self) -> Experiment:
        """What was asked for."""
        job = self.storage.manifest["job"]
        if isinstance(job, dict) and "train" not in job:
            raise ValueError(
                f"{self.folder} has no supernet and no ranking: it is no run of `kdnas train`, or of `kdnas run` with "
                "--space. Name such a run."
            )
        try:
            return Experiment.from_json(job)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.storage.path(MANIFEST)} does not describe a job ({error!r}). Start again in another folder."
            ) from error

    @cached_property
    def data(self) -> Data:
        """The data set; a warning is logged where it has changed since the run began."""
        source = self.experiment.train.data
        check_places(source, f"the run {self.folder}", "--data DATA")
        data: Data = source.build(Data)
        compare_data(self.storage, data)
        return data

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, fitted to the data."""
        return self.data.fitted(self.experiment.train.space)

    @property
    def teacher_spec(self) -> Spec:
        """What makes the teacher."""
        teacher = self.experiment.train.teacher
        return fitted_spec(teacher, self.storage) if isinstance(teacher, FitTeacher) else teacher

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher."""
        source = self.teacher_spec
        check_places(source, f"the run {self.folder}", "--teacher TEACHER")
        self.storage.report_inputs(source.to_json())
        with insisting(bool(self.storage.manifest.get("insists"))):
            return build_teacher(source, self.data)

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return default_device()

    def fresh_supernet(self, *, trained: bool = False) -> Supernet:
        """The supernet before training; `trained` leaves out initial weights, which the checkpoint replaces."""
        settings = self.experiment.train
        return initial_supernet(dataclasses.replace(settings, weights="") if trained else settings, self.space)

    @cached_property
    def supernet(self) -> Supernet:
        """The trained supernet, in evaluation mode; for a run that trains none, its shapes without weights.

        Raises:
            ValueError: it is not trained yet, or its checkpoint is damaged or from another space.
        """
        if self.experiment.train.distiller is None:
            space = self.space  # read before: the data would be built on the meta device too
            with torch.device("meta"):
                return Supernet(space).eval()
        self.storage.require("train", f"kdnas train EXPERIMENT --out {self.storage.folder}")
        supernet = self.fresh_supernet(trained=True)
        path = self.storage.path(CHECKPOINT)
        load_strictly(supernet, part_of(path, "training", "model"), str(path))
        broken = [name for name, tensor in supernet.state_dict().items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(
                f"{path} holds {len(broken)} tensors that are not finite, such as {broken[0]}: the supernet's training "
                "diverged. Train again with a lower learning rate."
            )
        return supernet.to(self.device).eval()

    def scorer(self, source: Spec) -> Scorer:
        """A scorer of this run's subnets.

        Raises:
            ValueError: it needs supernet weights, and the run trains no supernet.
        """
        return build_scorer(source, self.experiment.train.distiller)

    @cached_property
    def distiller(self) -> Distiller:
        """The distiller that trained the supernet, with its learnable parts, in evaluation mode.

        Raises:
            ValueError: the supernet is not trained yet.
        """
        self.storage.require("train", f"kdnas train EXPERIMENT --out {self.storage.folder}")
        settings = self.experiment.train
        if settings.distiller is None:
            raise ValueError(f"{self.storage.folder} trains no supernet. Begin a run with a distiller.")
        distiller = settings.distiller.build(Distiller)
        # A training of its own makes the parts, in the shapes that the first batch gives them.
        Training(self.fresh_supernet(trained=True), distiller, self.data, self.teacher, settings.recipe, self.device)
        path = self.storage.path(CHECKPOINT)
        load_strictly(distiller, part_of(path, "training", "distiller"), str(path))
        return distiller.to(self.device).eval()

    def evidence(self, num_images: int, seed: int) -> Evidence:
        """Fixed images of the search part, and what the teacher says of them.

        Raises:
            ValueError: fewer than 3 images.
        """
        if num_images < 3:
            raise ValueError(f"`num_images` must be at least 3, got {num_images}.")
        part = self.data.search
        chosen = torch.randperm(len(part), generator=torch_rng("evidence", seed))[:num_images]
        pixels = part.take(chosen).to(self.device)
        distiller = self.experiment.train.distiller
        # Its learned parts take a training to be made, so they are made for one that rates blocks only.
        rater = self.distiller if distiller and isinstance(distiller.build(Distiller), BlockRater) else None
        return Evidence(
            pixels,
            channels_last(self.data.normalise(pixels)),
            part.truths(chosen).to(self.device),
            self.teacher.to(self.device)(pixels),
            self.teacher,
            self.data,
            seed,
            rater if isinstance(rater, BlockRater) else None,
            self.supernet,
        )


def build_scorer(source: Spec, distiller: Spec | None) -> Scorer:
    """A scorer of the subnets of a supernet that a distiller trained.

    Raises:
        ValueError: an option of the scorer, or it needs supernet weights, and there is no distiller.
    """
    scorer = source.build(Scorer)
    if scorer.reads_weights and distiller is None:
        raise ValueError(
            f"the scorer {source.name} needs trained supernet weights, and the distiller none trains no supernet. Use "
            "a scorer that needs none, such as short_training, or another distiller."
        )
    return scorer


def initial_supernet(settings: Train, space: SearchSpace) -> Supernet:
    """The supernet before training, with the weights that the settings name.

    Raises:
        ValueError: weights of another network.
    """
    share = corner if settings.share is None else settings.share.build()
    supernet = initialised(lambda: Supernet(space, share), settings.recipe.seed)
    if settings.weights:
        load_weights(supernet, Path(settings.weights))
    return supernet


def build_teacher(source: Spec, data: Data) -> Teacher:
    """A teacher for this data.

    Raises:
        ValueError: as its maker; or the classes of it or of a member differ from the data's, or their order does.
    """
    teacher = teacher_of(source, data)
    difference = other_names(teacher, data)
    if difference:
        insist_or_raise([f"{difference} Use a teacher of these very classes, in their order."])
    return teacher


def other_names(teacher: Teacher, data: Data) -> str:
    """A sentence on how the class names of a teacher or of a member differ from the data's; empty if none do."""
    names = (module.class_names for module in teacher.modules() if isinstance(module, Teacher))
    other = next((known for known in names if known is not None and known != data.class_names), None)
    return "" if other is None else other_classes(other, data, "the teacher")


@contextmanager
def insisting(value: bool) -> Iterator[None]:
    """Inside, what `insist_or_raise` would refuse is a warning."""
    token = _INSISTS.set(value or _INSISTS.get())
    try:
        yield
    finally:
        _INSISTS.reset(token)


def insist_or_raise(refusals: Sequence[str]) -> None:
    """Log warnings inside of `insisting(True)`.

    Raises:
        ValueError: outside of it, where there are any.
    """
    if refusals and not _INSISTS.get():
        raise ValueError(" ".join(refusals) + " To go on all the same, add --insist.")
    for refusal in refusals:
        _log.warning(refusal)


def record_data(storage: RunFolder, data: Data) -> None:
    """Write the fingerprint of a new run's data and whether its user insists, or warn of data that have changed."""
    additions = {} if "data" in storage.manifest else {"data": data.fingerprint}
    additions |= {"insists": True} if _INSISTS.get() else {}
    additions |= measure_of(data.task)
    compare_data(storage, data)
    if not additions.items() <= storage.manifest.items():
        storage.manifest |= additions
        storage.save()


def compare_data(storage: RunFolder, data: Data) -> None:
    """Log a warning where data have changed since a run began; of data that were named again, raise a ValueError."""
    fingerprint = storage.manifest.get("data")
    storage.verify(changes(fingerprint or {}, data))
    report_changes(fingerprint, data, f"run {storage.folder}")


def report_changes(fingerprint: Mapping[str, str] | None, data: Data, whose: str) -> None:
    """Log a warning where data have another fingerprint than a run or a student began with."""
    difference = changes(fingerprint or {}, data)
    if difference:
        _log.warning(
            f"the data of {whose} have changed: {difference}. Images that it learnt from may be in another part now, "
            f"so that {data.task.measures} on search and test images are too high. Begin anew for figures that can be "
            "compared."
        )


def other_classes(names: Sequence[str], data: Data, whose: str) -> str:
    """A sentence on how a network's classes differ from the data's: their number, or the first other name."""
    if len(names) != len(data.class_names):
        return f"{whose} knows {len(names)} classes, the data has {len(data.class_names)}."
    place = next(i for i, pair in enumerate(zip(names, data.class_names, strict=True)) if len({*pair}) > 1)
    return f"class {place} is {names[place]!r} to {whose} and {data.class_names[place]!r} in the data."


def check_model_type(distiller: Spec | None, model: type[Supernet | Network]) -> None:
    """Raise a ValueError where a distiller's class is for the other kind of model, before anything is trained.

    What a function returns is checked when it is called.
    """
    target = None if distiller is None else resolve(distiller.make)
    if isinstance(target, type) and issubclass(target, Distiller):
        target.check_model_type(model)


def fitted_spec(settings: FitTeacher, storage: RunFolder) -> Spec:
    """The spec of a fitted teacher: one network, the route of its snapshots, or the ensemble of its members."""
    folders = [storage.path(SNAPSHOTS, str(k)) for k in range(1, settings.snapshots)]
    folders += [storage.path(MEMBERS, str(k)) for k in range(1, settings.members)]
    members = tuple(spec(student_teacher, path=str(f.resolve())) for f in (*folders, storage.path(TEACHER)))
    kind = "route" if settings.snapshots > 1 else "ensemble"
    return members[0] if len(members) == 1 else spec(several_teachers, kind=kind, members=members)


def closing_table(storage: RunFolder) -> str:
    """A row per network: measure, balanced accuracy where it is recorded, params, MACs, seconds; and the controls."""
    results = storage.results()
    rows = results["rows"]
    width = max([12, *(len(row["name"]) + 1 for row in rows)])
    balances = any("balanced_accuracy" in row for row in rows)
    names = (str(storage.manifest.get("measure", Task.measure)), *["balanced"] * balances, "params", "MACs", "seconds")
    widths = (10, *[10] * balances, 12, 14, 10)
    lines = [" " * width + "".join(f"{name:>{space}}" for name, space in zip(names, widths, strict=True))]
    for row in rows:
        macs, name = "-" if row["macs"] is None else f"{row['macs']:,}", f"{row['name']:<{width}}"
        balanced = f"{row['balanced_accuracy']:>10.2%}" if "balanced_accuracy" in row else "-".rjust(10) * balances
        lines.append(f"{name}{row['accuracy']:>10.2%}{balanced}{row['params']:>12,}{macs:>14}{row['seconds']:>10.1f}")
    lines += ["", *(control["sentence"] for control in results["controls"].values())]
    lines.append(f"report: {storage.path(REPORT)}")
    return "\n".join(lines)
