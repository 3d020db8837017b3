"""Pruning to a student: what stays is chosen under the source, fitted in closed form, and retrained."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from kdnas.conversion.importance import Importance, channel_importance, sort_by_importance
from kdnas.conversion.reconstruction import Reconstruction
from kdnas.conversion.removal import Counts, Masks, Removal, counts_of, units
from kdnas.conversion.scale_factors import Factors
from kdnas.conversion.shares import ShareSearch, agreement, leading
from kdnas.costs.budget import Budget, Cost, described
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.costs.latency import LatencyTable
from kdnas.costs.size import shipped_bytes
from kdnas.data.base import Data, Images
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy, final_measures, row_of, student_grades
from kdnas.jobs._pictures import write_pictures
from kdnas.jobs._preflight import image_seconds, preflight
from kdnas.jobs._run import build_teacher, record_data
from kdnas.jobs._source import Source, fed_as, load
from kdnas.jobs._trials import MIXTURES, Variant, compare, mixture
from kdnas.jobs.chain import say
from kdnas.jobs.fit import fit_teacher, teacher_result, untrained
from kdnas.jobs.retrain import retrain
from kdnas.network import Network, calibrate, channels_last, default_device, image_batches, modes
from kdnas.randomness import initialised, python_rng, torch_rng
from kdnas.report import write_report
from kdnas.runs.folder import LATENCIES, STUDENTS, RunFolder
from kdnas.runs.progress import progress
from kdnas.settings import FitTeacher, Prune, Retrain
from kdnas.space import Blueprint
from kdnas.specs import Spec, spec
from kdnas.statistics import compare_accuracy
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.tables import unstructure
from kdnas.teachers import student_teacher
from kdnas.teachers.base import Teacher
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training
from kdnas.training.shared import check_batch

FACTORS = "factors.safetensors"
CANDIDATES = "removals.jsonl"


class _Candidate(TypedDict):
    counts: Counts
    score: float


_REMOVAL = "removal-"
_CHOSEN, _EQUAL, _RANDOM = f"{_REMOVAL}chosen", f"{_REMOVAL}equal", f"{_REMOVAL}random"
"""Student folders of what the removals leave, not yet retrained; the controls have the names without `removal-`."""
_CALIBRATION = 250  # images per batch
_REHEARSED = 32  # images by which the seconds of a candidate are estimated, and positions that layers are fitted to
_CONTROLS = {
    "trained": ("what the trials chose, retrained alike", "the trials chose better than the search part did"),
    "control": ("the same network retrained without a teacher", "distillation did not help"),
    "equal": ("equal shares of all channels, retrained alike", "the search chose no better than equal shares"),
    "random": (
        "random channels and blocks removed to the same cost, retrained alike",
        "the choice is no better than chance",
    ),
}


class _Folded(nn.Module):
    """A network with its factors in place."""

    def __init__(self, network: Network, factors: Factors) -> None:
        super().__init__()
        self.network, self.factors = network, factors

    def forward(self, images: Tensor) -> Tensor:
        return self.factors.outputs(self.network, images).logits


def prune(settings: Prune, folder: Path, *, deploy: bool = True) -> dict[str, Any]:
    """Remove channels and blocks within the budget, retrain what is left with and without the teacher; resumable.

    Three removals are candidates: the searched one (or that of scale factors), equal shares of all channels, and random
    channels and blocks. What each leaves is fitted to the source in closed form. Trials, a tenth of the retraining on
    the train part, are compared on the search part: first the three removals, then mixtures of labels and teacher, and
    fresh weights. With controls the other two are retrained whole as well, and the student is the best of all on the
    search part.

    The folder holds `students/student`, a student folder per control and per removal before it was retrained
    (`removal-chosen`, `removal-equal`, `removal-random`), the source with its channels in order (`source`,
    `source-random`), and a report. Only after the choice is the test part read, once for each network.

    Args:
        settings: all settings.
        folder: the run folder.
        deploy: whether to write and compare every form of the student.

    Returns:
        Accuracy on the test part, params, MACs and seconds of the student, its folder, and a row per control.

    Raises:
        ValueError: the folder holds something else, the source cannot be converted or has other classes, or the budget
            cannot be met, or needs no removal.

    Reference: the objective of layers' reconstruction: He et al., Channel Pruning, ICCV 2017; scale factors: Gu, Tresp,
        Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612).
    Differs: shares of all groups are searched together under the whole network's divergence from the source.
    """
    check_batch(settings.retrain)
    storage = RunFolder.create(folder, settings.to_json(), settings.recipe.seed)
    job = begin(settings, storage)
    if storage.phase("removal") is None:
        job.remove()
    variants = job.decide()
    rows = job.train(variants, deploy=deploy)
    write_report(storage.folder)
    controls = {name: rows[name] for name in _CONTROLS if name in rows}
    return {"student": str(storage.path(STUDENTS, "student")), **rows["student"], "controls": controls}


def begin(settings: Prune, storage: RunFolder) -> "Job":
    """Data, teacher and source; what does not fit is refused before a teacher is trained or asked about images."""
    data: Data = settings.data.build(Data)
    seed = settings.recipe.seed
    choice = settings.teacher
    teacher = None if isinstance(choice, FitTeacher) else build_teacher(choice, data)
    is_fitted = settings.source == "teacher" and isinstance(choice, FitTeacher)
    known = teacher
    if isinstance(choice, FitTeacher) and choice.members == choice.snapshots == 1:
        known = untrained(choice, data, seed)
    source = load(settings.source, known, data, seed)
    whole = source.space.blueprint(source.space.largest)
    table = _latencies(settings.budget, storage, whole)
    budget = settings.budget.of(_spent(settings.budget, table, whole))
    if not storage.manifest["phases"]:
        _check_budget(settings, source, budget, table)
        options: dict[str, Any] = {
            "teacher": choice,
            "budget": budget,
            "finals": (settings.trainings, settings.retrain),
        }
        if settings.method == "shares":
            network, seconds = _rehearsed(settings, source, budget, table, data)
            options["search"] = settings.num_candidates, min(seconds, settings.max_time)
        else:
            network = initialised(lambda: Network(whole), seed)
        recipe = settings.retrain if settings.method == "shares" else settings.recipe
        preflight(data, folder=storage.folder, network=network, recipe=recipe, **options)
    record_data(storage, data)
    teacher_spec = fit_teacher(choice, data, storage) if isinstance(choice, FitTeacher) else choice
    teacher = teacher or build_teacher(teacher_spec, data)
    source = load(settings.source, teacher, data, seed) if is_fitted else source
    return Job(settings, storage, fed_as(data, source.preprocessing), teacher_spec, teacher, source, budget, table)


def _latencies(budget: Budget, storage: RunFolder, whole: Blueprint) -> LatencyTable | None:
    """The table of the run's latencies, fitted to the whole network; None where they are not bounded."""
    if "latency" not in budget.names:
        return None
    write = lambda row: storage.add(LATENCIES, [row])  # noqa: E731
    table = LatencyTable(default_device(), storage.lines(LATENCIES), write, target=budget.target, beside=whole)
    if not budget.target.table:
        table.calibrate([whole])
    return table


def _check_budget(settings: Prune, source: Source, budget: Budget, table: LatencyTable | None) -> None:
    """Refuse a budget that the whole network meets, or not even the smallest one that a removal leaves."""
    whole = source.space.blueprint(source.space.largest)
    if budget.admits(cost(whole), **_measured(budget, table, whole)):
        raise ValueError(
            f"the network has {described(_spent(budget, table, whole))}, within {budget}, so there is nothing to "
            "remove. Lower the budget, or begin with a larger network."
        )
    removal = Removal(source.space, units(source.space))
    search = ShareSearch(removal, lambda blueprint: True, lambda counts: 0.0, _divisor(settings, table))
    smallest = removal.blueprint(search.least)
    spent = _spent(budget, table, smallest)
    if table is not None and not table.target.table:  # what is handed over is measured whole too
        spent["latency"] = max(spent["latency"], table.measured(smallest))
    if any(spent[name] > bound for name, bound in budget.bounds().items()):
        raise Infeasible(
            f"infeasible: the smallest network that a removal leaves has {described(spent)}, not within {budget}. "
            "Raise the budget, or begin with a smaller network."
        )


def _rehearsed(
    settings: Prune, source: Source, budget: Budget, table: LatencyTable | None, data: Data
) -> tuple[Network, float]:
    """A student of equal shares, where the budget admits any, and rough seconds of all candidates of the search."""
    device, space = default_device(), source.space
    pixels, _ = data.search.sample(min(_REHEARSED, len(data.search)), torch_rng("rehearsal"))
    images = data.normalise(pixels.to(device))
    fitted = Reconstruction(
        Removal(space, units(space)), source.supernet.to(device).extract(space.largest).eval(), images, _REHEARSED
    )
    admits = lambda blueprint: budget.admits(cost(blueprint), **_measured(budget, table, blueprint))  # noqa: E731
    search = ShareSearch(fitted.removal, admits, lambda counts: 0.0, _divisor(settings, table))
    if table is not None:
        search.equal_shares()  # measures the layers, once
    began = time.perf_counter()
    network = fitted.network(leading(fitted.removal, search.equal_shares() or search.least))
    seconds = time.perf_counter() - began
    with torch.no_grad(), modes(network):
        seconds += min(settings.num_images, len(data.search)) * image_seconds(network, images)
    return network, settings.num_candidates * seconds


def _divisor(settings: Prune, table: LatencyTable | None) -> int:
    """The divisor of the search's widths; see `Prune.divisor`."""
    return settings.divisor or int(table is None)


def _spent(budget: Budget, table: LatencyTable | None, blueprint: Blueprint) -> dict[str, float]:
    """All costs of a network that are counted, or bounded."""
    return {**cost(blueprint)._asdict(), **_measured(budget, table, blueprint)}


def _measured(budget: Budget, table: LatencyTable | None, blueprint: Blueprint) -> dict[str, float]:
    """Latency and size of a network, where they are bounded and can be known."""
    measured = {} if table is None else {"latency": table.seconds(blueprint)}
    return measured | ({"size": shipped_bytes(blueprint, budget.format)} if "size" in budget.names else {})


@dataclasses.dataclass
class Job:
    """A pruning: its settings and what they name.

    Attributes:
        budget: in absolute numbers.
        table: of latencies, where they are bounded.
        tried: number of candidates.
        candidate: seconds that a candidate took, with all that were drawn and not within the budget.
    """

    settings: Prune
    storage: RunFolder
    data: Data
    teacher_spec: Spec
    teacher: Teacher
    source: Source
    budget: Budget
    table: LatencyTable | None
    tried: int = 0
    candidate: float = 0.0

    @property
    def matches_features(self) -> bool:
        """Whether the teacher is the source, so that channels are matched one by one."""
        return self.settings.source == "teacher" and not self.keeps_weights

    @property
    def keeps_weights(self) -> bool:
        """Whether the chosen removal keeps the weights that were trained with scale factors."""
        return self.settings.method == "scale_factors" and self.settings.as_published

    def remove(self) -> None:
        """Write the networks that the removals leave, and the source in the order of each one's channels."""
        began = time.perf_counter()
        images, labels = self._images(self.data.train, "reconstruction")
        order = partial(channel_importance, method="reconstruction", images=images, labels=labels)
        fitted = self._sorted(_EQUAL, order, images)
        search = self._search(fitted, self.settings.max_time - (time.perf_counter() - began))
        equal = search.equal_shares()
        networks = {} if equal is None else {_EQUAL: self._write(_EQUAL, fitted, equal, images)}
        if self.settings.method == "shares":
            chosen, facts = search.best.counts, {"candidates": self.tried}
            others = [c.counts for c in search.finalists(self.settings.finalists + 1) if c.counts != equal]
            for name, counts in zip(self._searched, others, strict=False):
                networks[name] = self._write(name, fitted, counts, images)
            network = networks[_EQUAL if chosen == equal else _CHOSEN]
        else:
            network, chosen, facts = self._remove_by_factors(fitted.source, images)
        left, whole = cost(network.blueprint), cost(fitted.source.blueprint)
        rng = torch_rng("random removal", self.settings.recipe.seed)
        order = lambda network, groups: [torch.rand(g.size, generator=rng) for g in groups]  # noqa: E731
        fitted = self._sorted(_RANDOM, order, images)
        if (masks := self._at_random(fitted.removal, left, rng)) is not None:
            self._write(_RANDOM, fitted, counts_of(masks), images)
        facts |= {"accuracy": accuracy(network.to(default_device()), self.data.search, self.data)}
        self.storage.finish("removal", whole=whole._asdict(), left=left._asdict(), counts=chosen, **facts)
        say(f"prune: {left.params:,} params and {left.macs:,} MACs are left of {whole.macs:,}: {chosen}")

    def decide(self) -> dict[str, Variant]:
        """How the student and its controls are trained, by name; recorded as the phase `trials`."""
        settings, storage = self.settings, self.storage
        inherited = "fresh" if settings.weights == "fresh" else "inherited"
        _, *others = MIXTURES
        removals = [name for name in (*self._searched, _EQUAL, _RANDOM) if storage.path(STUDENTS, name).exists()]
        tried = dict(self.variant(name, inherited) for name in removals)
        best = compare(storage, tried, settings.data)
        name = tried[best].student.name
        tried = {best: tried[best]}
        if settings.distiller is None:
            tried |= dict(self.variant(name, inherited, other) for other in others)
        if settings.weights == "chosen":
            fresh, variant = self.variant(name, "fresh")
            tried[fresh] = variant
        best = compare(storage, tried, settings.data)
        way = tried[best]
        if storage.phase("trials") is None:
            say(f"trials of a tenth of the steps on the search part: {best} is the best")
            storage.finish("trials", best=best, retrain=unstructure(way.settings))
        variants = {"trained": way}
        if settings.controls:
            variants |= {
                removal.removeprefix(_REMOVAL): way._replace(
                    student=storage.path(STUDENTS, removal), teacher=self._teacher_of(removal)
                )
                for removal in removals
                if removal in (_EQUAL, _RANDOM) and removal != name
            }
        return variants

    def train(self, variants: dict[str, Variant], *, deploy: bool) -> dict[str, dict[str, Any]]:
        """Retrain the student and its controls; the student is the best on the search part."""
        rows = {name: self._retrained(name, variant) for name, variant in variants.items()}
        best = max(rows, key=lambda name: rows[name]["search_accuracy"])
        removals = {name: variant.student.name.removeprefix(_REMOVAL) for name, variant in variants.items()}
        if self.storage.phase("choice") is None:
            reached = {removals[name]: row["search_accuracy"] for name, row in rows.items()}
            self.storage.finish("choice", removal=removals[best], reached=reached)
            texts = ", ".join(f"{name} removal {value:.2%}" for name, value in reached.items())
            measure = self.data.task.measure
            say(f"prune: retrained, {measure} on the search part: {texts}; the student is of {removals[best]} removal")
        if self.settings.controls and self.data.task.has_classes:  # features alone have no student without a teacher
            labels = dataclasses.replace(variants[best].settings, distiller=spec(FromLabels))
            rows["control"] = self._retrained("control", variants[best]._replace(settings=labels))
        results = self._measured_on_test(rows, best)
        if self.storage.phase("student") is None:
            network, card = read_student(self.storage.path(STUDENTS, best))
            origin = {**card.origin, "test_accuracy": results["student"]["accuracy"]}
            card = dataclasses.replace(card, origin=origin)
            write_student(self.storage.path(STUDENTS, "student"), network, card, deploy=deploy)
            self.storage.finish("student", **results["student"], chosen=best)
        return results

    def _measured_on_test(self, rows: dict[str, dict[str, Any]], best: str) -> dict[str, dict[str, Any]]:
        """Read the test part, after the choice, and record the closing table and what it says of the controls."""
        storage, task = self.storage, self.data.task
        if all(row["name"] != "teacher" for row in storage.results()["rows"]):
            storage.record_result(teacher_result(storage, self.teacher, self.data))
        results, hits = dict[str, dict[str, Any]](), {}
        for row in (best, *(name for name in rows if name != best)):
            folder, name = storage.path(STUDENTS, row), "student" if row == best else row
            grades = student_grades(folder, self.data)
            measures = final_measures(torch.from_numpy(grades), self.data, f"the student {row}")
            results[name], hits[name] = {**rows[row], **measures}, grades.astype(float)[None]
            storage.record_result({"name": name, **row_of(results[name])})
        write_pictures(storage.folder, self.data, storage.path(STUDENTS, best), self.teacher, hits["student"][0])
        storage.record_controls(
            {
                "distillation" if name == "control" else name: compare_accuracy(
                    "student", hits["student"], hits[name], *words, **task.claims
                )
                for name, words in _CONTROLS.items()
                if name in hits
            }
        )
        return results

    def _retrained(self, name: str, variant: Variant) -> dict[str, Any]:
        """Retrain a network, and measure it on the search part."""
        if self.storage.phase(name) is None:
            student, settings, teacher = variant
            out = self.storage.path(STUDENTS, name)
            options = {"phase": name, "data": self.settings.data, "teacher": teacher}
            row = row_of(retrain(student, settings, out, part="search", deploy=False, **options))
            row["search_accuracy"] = row.pop("accuracy")
            self.storage.finish(name, **row)
        return self.storage.require(name, "kdnas prune")

    @property
    def _searched(self) -> list[str]:
        """Student folders of the best removals of a search, without equal shares, which are a candidate anyway."""
        return [_CHOSEN, *(f"{_CHOSEN}-{place}" for place in range(2, self.settings.finalists + 1))]

    def variant(
        self, name: str, weights: Literal["fresh", "inherited"], mix: str = next(iter(MIXTURES))
    ) -> tuple[str, Variant]:
        """A way to train what a removal leaves, and its name."""
        distiller = self.settings.distiller or mixture(
            mix, self.settings.retrain.steps, self.data.task, features=self.matches_features
        )
        settings = Retrain(distiller=distiller, recipe=self.settings.retrain, weights=weights)
        loss = "the given loss" if self.settings.distiller else mix
        words = f"{name.removeprefix(_REMOVAL)} removal, {loss}, {weights} weights"
        return words, Variant(self.storage.path(STUDENTS, name), settings, self._teacher_of(name))

    def _teacher_of(self, name: str) -> Spec:
        if not self.matches_features:
            return self.teacher_spec
        return spec(student_teacher, path=str(self.storage.path(STUDENTS, self._source_of(name)).resolve()))

    def _source_of(self, removal: str) -> str:
        """The student folder of the source with its channels in the order of a removal."""
        if removal == _CHOSEN and self.settings.method == "scale_factors":
            return "source-factors"
        return "source-random" if removal == _RANDOM else "source"

    def _search(self, fitted: Reconstruction, seconds: float) -> ShareSearch:
        """Candidates within the budget, begun within so many seconds; recorded scores are not computed again."""
        images, labels = self._images(self.data.search, "shares")
        with torch.no_grad():
            target = torch.cat([fitted.source(batch).logits for batch in image_batches(images)])
        rows = self.storage.lines(CANDIDATES, _Candidate)
        known = {json.dumps(row["counts"], sort_keys=True): row["score"] for row in rows}

        def score(counts: Counts) -> float:
            key = json.dumps(counts, sort_keys=True)
            if key not in known:
                network = fitted.network(leading(fitted.removal, counts))
                distance = self.data.task.divergence
                known[key] = agreement(network, images, target, distance=distance, labels=labels)
                self.storage.add(CANDIDATES, [{"counts": counts, "score": known[key]}])
            return known[key]

        divisor = _divisor(self.settings, self.table)
        search = ShareSearch(fitted.removal, self._admits, score, divisor, self._measured())
        count = self.settings.num_candidates if self.settings.method == "shares" else 1
        with progress("removal", count) as bar:
            rng = python_rng("shares", self.settings.recipe.seed)
            began = time.perf_counter()

            def watch(done: int, best: float) -> None:
                bar.update(done, f"best {best:.4f}")
                self.tried, self.candidate = done, (time.perf_counter() - began) / done

            search.run(count, rng, watch, keep=max(5, self.settings.finalists), seconds=seconds)
        if self.tried < count:
            say(f"prune: {self.tried} of {count} removals were tried within {self.settings.max_time:g} s")
        return search

    def _at_random(self, removal: Removal, left: Cost, rng: torch.Generator) -> Masks | None:
        """What stays where random channels and blocks go, within the budget, at the cost of what the search left.

        None where so little is within the budget that no network is left.
        """
        values = {unit.key: torch.rand(unit.size, generator=rng) for unit in removal.units}
        whole = {key: value >= 0 for key, value in values.items()}
        bounds = {name: float(bound) for name, bound in left._asdict().items() if name in self.budget.names}
        bounds = bounds or {"macs": float(left.macs)}
        while True:
            try:
                masks = removal.within(Budget(**bounds), values, whole)
            except ValueError:
                return None
            excess = self._excess(removal.remaining(masks))
            if excess <= 0:
                return masks
            # Latency and bytes do not follow from counts: less is kept until they are met too.
            bounds = {name: bound / (1.02 * (1 + excess)) for name, bound in bounds.items()}

    def _excess(self, blueprint: Blueprint) -> float:
        """The largest relative overshoot of a network, whose latency is measured whole where that can be done."""
        measured = self._measured()
        times = 1.0 if measured is None else measured(blueprint)
        return self.budget.excess(cost(blueprint), **self._costs(blueprint, times))

    def _admits(self, blueprint: Blueprint, times: float = 1.0) -> bool:
        """Whether a network is within the budget, if its latency is so many times of what the table says."""
        return self.budget.admits(cost(blueprint), **self._costs(blueprint, times))

    def _costs(self, blueprint: Blueprint, times: float) -> dict[str, float]:
        """Latency and size, where they are bounded, if the latency is so many times of what the table says."""
        costs = _measured(self.budget, self.table, blueprint)
        return costs if self.table is None else costs | {"latency": times * costs["latency"]}

    def _measured(self) -> Callable[[Blueprint], float] | None:
        """How many times of what the table says a network takes; None where nothing can be measured."""
        table = self.table
        if table is None or table.target.table:
            return None
        return lambda blueprint: table.measured(blueprint) / table.seconds(blueprint)

    def _sorted(self, removal: str, importance: Importance, images: Tensor) -> Reconstruction:
        """The source with its channels in this order, stored for a removal, and its layers' inputs on the images."""
        space, supernet = self.source.space, self.source.supernet.to(images.device)
        sort_by_importance(supernet, importance)
        network = supernet.extract(space.largest).eval()
        self._store(self._source_of(removal), network)
        return Reconstruction(Removal(space, units(space)), network, images)

    def _images(self, part: Images, purpose: str) -> tuple[Tensor, Tensor]:
        """Normalised images and labels of a part."""
        rng = torch_rng(purpose, self.settings.recipe.seed)
        chosen = torch.randperm(len(part), generator=rng)[: self.settings.num_images]
        pixels = part.take(chosen).to(default_device())
        return channels_last(self.data.normalise(pixels)), part.truths(chosen).to(default_device())

    def _write(self, name: str, fitted: Reconstruction, counts: Counts, images: Tensor) -> Network:
        """Write what counts leave, and return it."""
        network = fitted.network(leading(fitted.removal, counts))
        calibrate(network, [part for batch in image_batches(images) for part in batch.split(_CALIBRATION)])
        self._store(name, network)
        return network

    def _store(self, name: str, network: Network) -> None:
        origin = {"data": self.settings.data.to_json(), "teacher": self.teacher_spec.to_json()}
        origin |= {"recipe": unstructure(self.settings.retrain)}
        write_student(self.storage.path(STUDENTS, name), network, Card.of(network, self.data, origin), deploy=False)

    def _remove_by_factors(self, source: Network, images: Tensor) -> tuple[Network, Counts, dict[str, Any]]:
        """Train the source with a factor per channel and block, and remove the least ones; counts, and facts."""
        settings, space = self.settings, self.source.space
        network = copy.deepcopy(source).requires_grad_(True)
        rounds, normalised = settings.rounds if settings.penalty is None else 1, not settings.as_published
        factors = Factors(
            space,
            penalty=settings.penalty,
            budget=self.budget,
            rounds=rounds,
            by_cost=settings.by_cost,
            normalised=normalised,
        )
        factors.within(self.budget)  # refuses a budget that cannot be met before anything is trained
        training = Training(network, factors, self.data, self.teacher, settings.recipe, default_device())
        watch = lambda: {"accuracy": accuracy(_Folded(network, factors), self.data.search, self.data)}  # noqa: E731
        train_with_checkpoints(training, "factors", self.storage.path(FACTORS), self.storage, watch)
        network, factors = network.cpu().eval(), factors.cpu()
        masks = factors.within(self.budget)
        values = list(factors.factors.values())
        facts = {"zeros": sum(int((f == 0).sum()) for f in values), "factors": sum(f.numel() for f in values)}
        if self.keeps_weights:
            left = factors.removed(network, masks).eval()
            self._store(_CHOSEN, left)
            return left, counts_of(masks), facts
        fitted = self._sorted(_CHOSEN, factors.importance, images)
        counts = fitted.removal.sizes | counts_of(masks)
        return self._write(_CHOSEN, fitted, counts, images), counts, facts
