"""The trainings that decide which network of a ranking becomes the student, and those of its controls."""

import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, TypedDict, final

import numpy as np
import torch
from numpy.typing import NDArray

from kdnas.architecture import Architecture
from kdnas.costs.check import BudgetCheck, largest_within
from kdnas.costs.count import cost
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import final_measures, near_chance, row_of, student_grades
from kdnas.jobs._pictures import write_pictures
from kdnas.jobs._preflight import duration
from kdnas.jobs._run import Run
from kdnas.jobs._trainings import Job, TrainingRow, Trainings, marks, with_length
from kdnas.jobs._workers import Workers, check_workers
from kdnas.jobs.fit import teacher_result
from kdnas.jobs.search import latency_table
from kdnas.randomness import python_rng
from kdnas.ranking.early_stopping import survivors
from kdnas.ranking.order import difference, finalists, ranked
from kdnas.report import write_report
from kdnas.runs.entry import CONTRAST, RANDOM, Entry
from kdnas.runs.files import Damaged, current_folder
from kdnas.runs.folder import HITS, STUDENTS, WEIGHTS
from kdnas.searchers.random_search import RandomSearch
from kdnas.settings import SHARES, Control, Finals, Retrain, Search, contest_cost
from kdnas.settings import rungs as compared
from kdnas.specs import Spec, spec
from kdnas.statistics import Array, compare_accuracy
from kdnas.tables import structure, unstructure
from kdnas.tasks.base import Task
from kdnas.values import Count

log = logging.getLogger(__name__)
say = log.info

_ANEW = "Remove it; it is written anew."
_LIMITED = 1e8  # seconds; a longer time is no limit


class _Claim(NamedTuple):
    """What a control is compared with the student for.

    Attributes:
        row: its name in the closing table.
        name: of the claim.
        words: the control's network.
        otherwise: conclusion where it is better than the student.
    """

    row: str
    name: str
    words: str
    otherwise: str


_CLAIMS: dict[Control, _Claim] = {
    "labels": _Claim(
        "control", "distillation", "the same network trained without a teacher", "distillation did not help"
    ),
    "random": _Claim(
        "random networks",
        "choice",
        "the best of as many random networks within the budget, trained and chosen alike",
        "the ranking chose no better than chance",
    ),
    "largest": _Claim(
        "largest",
        "size",
        "the largest network within the budget, trained alike",
        "the ranking chose no better than size does",
    ),
    "longer": _Claim(
        "longer",
        "cost",
        "place 1, trained for as many steps as all finalists together",
        "a longer training of place 1 was worth more than the finalists",
    ),
    "contrast": _Claim(
        "contrast",
        "contrasted",
        "the best subnet of the same search under the other score, trained alike",
        "the other score chose better",
    ),
}
CHANCE, LOST = "chance", "points lost"
CLAIMS = (CHANCE, LOST, *(claim.name for claim in _CLAIMS.values()))
"""The names of the claims about a student, in the order in which they are printed."""


def finals(
    run: Run, settings: Finals, retrain: Retrain, *, deploy: bool = True, workers: int | None = None
) -> dict[str, Any]:
    """Train the best of the last ranking, choose the student on the search part, and compare it with its controls.

    The finalists are trained to their first mark (half of the steps, or a quarter where there are four or more), the
    pruner stops some, the others go on to the next; the best of those that were trained whole is the student. Only
    then is the test part read, once for the teacher, the student and each control, and the outcome is stored. Every
    training is a student `students/finalist-N`; one that exists, of an earlier call or another search too, is not
    trained again.

    Args:
        run: with a finished search.
        settings: number of finalists, controls, pruner, seeds and time.
        retrain: distiller, recipe and initial weights of every training.
        deploy: whether to write and compare every form of `students/student`.
        workers: number of trainings side by side; by default see `default_workers`. No result depends on it.

    Returns:
        Folder, code, params, MACs and seconds of the student, its accuracy on the search part and on the test part (a
        mean over the seeds), and a row per finalist.

    Raises:
        ValueError: no search is finished, `max_time` is shorter than one training, or no training ended well.

    Reference: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS
        2016, successive halving; each stopping is Optuna's, judged beside all that reached the same mark.
    """
    with Workers(run, check_workers(run, workers)) as processes:
        return _held(_Finals(run, settings, retrain, Trainings(run, processes)), deploy=deploy)


def shared_finals(run: Run, settings: Finals, retrain: Retrain, url: str, *, deploy: bool = True) -> dict[str, Any]:
    """As `finals`, together with all processes, on any hosts, that were given the same run, settings and storage.

    The first process leads: it chooses, measures and records. All take trainings, each once; one whose process is not
    heard of for 30 seconds goes on elsewhere from its last checkpoint. The results are those of one process on the
    same kind of CPU, to the last bit. All write in the run's folder, so it lies where all hosts have it.

    Args:
        run: with a finished search, in the folder that all processes share.
        settings: as `finals`.
        retrain: as `finals`.
        url: of a database for Optuna, such as `postgresql://me@host/name`.
        deploy: as `finals`.

    Returns:
        As `finals`, in every process.

    Raises:
        ValueError: as `finals`; or the storage cannot be used, the folder is another than that of the process that
            leads, or that was stopped.
    """
    from kdnas.jobs import _shared  # SQLAlchemy: half a second

    _shared.check_named(run.storage.manifest["job"])
    plain = {"settings": unstructure(settings), "retrain": unstructure(retrain)}
    search = run.storage.require("search", f"kdnas search {run.folder}")["search"]
    train = _shared.trains(run)

    def lead(board: Any) -> dict[str, Any]:
        trainings = Trainings(run, _shared.SharedAnswers(board, train))
        board.outcome = _held(_Finals(run, settings, retrain, trainings), deploy=deploy)
        write_report(run.folder)
        return dict(board.outcome)

    name = f"kdnas finals {_shared.identity(run, search=search, **plain)}"
    result = _shared.led_run(run, url, name, train, lead, shares=True)
    return {**(result or {}), "student": str(run.storage.path(STUDENTS, "student"))}


def _held(job: "_Finals", *, deploy: bool) -> dict[str, Any]:
    run, retrain, storage = job.run, job.retrain, job.run.storage
    entrants = job.finalists(run.ranking())
    job.announce(list(entrants))
    contests = job.contests(list(entrants))
    contest = contests["finalist"]
    rows = [
        {**standing._asdict(), **dataclasses.asdict(row)}
        for standing, row in zip(entrants.values(), contest.rows, strict=False)
    ]
    storage.finish("finals", search=job.number, winner=contest.best.name, rows=rows)
    say(f"finals: {contest.best.name} is the best of {len(contest.rows)} on the search part; next: its controls")
    student, *_ = networks = job.networks(contests)
    trained = job.seeds(networks)
    results = job.measure(networks, trained)
    folder = storage.path(STUDENTS, "student")
    test_accuracy = results["student"]["accuracy"]
    if (storage.phase("student") or {}).get("training") != contest.best.name or not current_folder(folder).exists():
        job.trainings.deliver(
            contest.best, student.architecture, retrain, folder, deploy=deploy, test_accuracy=test_accuracy
        )
    for name in ("student", "control"):
        if name in results:
            row = {key: value for key, value in row_of(results[name]).items() if key != "seconds"}
            storage.finish(name, **row, training=trained[name][0].name)
    return {
        "student": str(folder),
        "code": contest.best.code,
        "search_accuracy": contest.best.accuracy,
        **row_of(results["student"]),
        "finalists": rows,
    }


@final
@dataclass
class _Contest:
    """Networks trained from mark to mark; a pruner stops some at each.

    Attributes:
        role: what their students are named after.
        architectures: those that take part, best first.
        rungs: the numbers of steps at which they are compared.
        curves: of each, the rows at these so far.
        alive: indices of those that go on.
    """

    role: str
    architectures: Sequence[Architecture]
    rungs: Sequence[int]
    curves: list[list[TrainingRow]] = field(init=False)
    alive: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.curves = [[] for _ in self.architectures]
        self.alive = list(range(len(self.architectures)))

    def jobs(self, rung: int, settings: Retrain) -> list[Job]:
        """The trainings up to a mark of those that go on; none where they are not compared at it."""
        alive = self.alive if rung in self.rungs else []
        return [Job(self.role, self.architectures[index], settings, rung) for index in alive]

    def compare(self, rows: Sequence[TrainingRow], pruner: Spec) -> None:
        """Take the rows of `jobs`, and stop some networks.

        Raises:
            ValueError: none could be trained.
        """
        for index, row in zip(self.alive, rows, strict=True):
            self.curves[index].append(row)
        self.alive = [index for index in self.alive if not self.curves[index][-1].problem]
        if not self.alive:
            name = "random network" if self.role == "random" else self.role
            raise ValueError(f"no {name} could be trained: {self.curves[0][-1].problem}")
        if rows[0].step < self.rungs[-1]:
            values = [[row.accuracy for row in curve if row.accuracy is not None] for curve in self.curves]
            others = [values[index] for index in range(len(values)) if index not in self.alive and values[index]]
            kept = survivors(pruner, self.rungs, [values[index] for index in self.alive] + others)
            self.alive = [self.alive[index] for index in kept]

    @property
    def rows(self) -> list[TrainingRow]:
        """The last row of each."""
        return [curve[-1] for curve in self.curves]

    @property
    def index(self) -> int:
        """That of the best network that was trained whole, of equal ones the first; or of the only one that is left."""
        if len(self.alive) == 1:
            return self.alive[0]
        return max(sorted(self.alive), key=lambda i: self.curves[i][-1].accuracy or 0.0)

    @property
    def best(self) -> TrainingRow:
        return self.rows[self.index]

    @property
    def architecture(self) -> Architecture:
        return self.architectures[self.index]

    @property
    def steps(self) -> int:
        """Of all trainings together, those that go on taken whole."""
        stopped = (curve[-1].step for index, curve in enumerate(self.curves) if index not in self.alive)
        return sum(stopped) + len(self.alive) * self.rungs[-1]


class _Grades(TypedDict):
    """A line of `test_hits.jsonl`: a student's weights by their digest, and the grades of the test images.

    The grades are in hexadecimal: a bit per image, or where `grade`, the shape of one, is there, little-endian numbers
    of the type `dtype`.
    """

    training: str
    weights: str
    images: Count
    hits: str
    grade: NotRequired[list[int]]
    dtype: NotRequired[str]


class _Standing(NamedTuple):
    """Where a finalist stands in the ranking; the largest network may be none of those that were scored."""

    place: int | None
    score: float | None


class _Network(NamedTuple):
    """A network of the closing table, its training, and what its students are named after."""

    name: str
    architecture: Architecture
    settings: Retrain
    role: str


@final
@dataclass
class _Finals:
    """The finals of a run's last search."""

    run: Run
    settings: Finals
    retrain: Retrain
    trainings: Trainings

    @property
    def workers(self) -> int:
        """Number of trainings side by side."""
        return 1 if self.trainings.workers is None else self.trainings.workers.count

    @cached_property
    def number(self) -> int:
        """That of the search."""
        number: int = self.run.storage.require("search", f"kdnas search {self.run.folder}")["search"]
        return number

    @cached_property
    def budget(self) -> BudgetCheck:
        """That of the search."""
        search = structure(self.run.storage.search(self.number)["settings"], Search)
        return BudgetCheck(self.run.space, search.budget, lambda: latency_table(self.run, search.budget.target))

    def finalists(self, ranking: Sequence[Entry]) -> dict[Architecture, _Standing]:
        """The best of a ranking that are apart, and in the last of three or more places the largest within the budget.

        Size chooses well where scores choose badly, at the cost of no further training; the search part decides.
        """
        settings = self.settings
        standings = {e.architecture: _Standing(place, e.score) for place, e in enumerate(ranking, 1)}
        chosen = [entry.architecture for entry in finalists(ranking, settings.finalists, settings.distance)]
        if settings.largest and settings.finalists > 2:
            largest, first = self._largest, chosen[: settings.finalists - 1]
            if all(difference(largest, architecture) >= settings.distance for architecture in first):
                chosen = [*first, largest]
        return {architecture: standings.get(architecture, _Standing(None, None)) for architecture in chosen}

    def announce(self, architectures: Sequence[Architecture]) -> None:
        """Log what is about to be trained, and roughly for how long."""
        run, steps, count = self.run, self.retrain.recipe.steps, len(architectures)
        each = self.trainings.seconds_of(architectures[0], self.retrain)
        apart = "" if count == self.settings.finalists else f" (no more are apart in {run.folder})"
        whole, controls = dataclasses.replace(self.settings, finalists=count).trainings
        side = f", one after another; {self.workers} go side by side" if self.workers > 1 else ""
        say(
            f"finals: {count} finalists{apart} cost {whole:.1f} trainings of {steps:,} steps, roughly "
            f"{duration(each * whole)}; seeds and controls {controls:.1f}, roughly {duration(each * controls)}{side}"
        )

    def contests(self, architectures: Sequence[Architecture]) -> dict[str, _Contest]:
        """Train the finalists, and as many random networks where there is that control, side by side."""
        steps = marks(self.retrain.recipe.steps)
        if self.settings.max_time <= _LIMITED:
            rung = steps[-compared(len(architectures))]
            first = self.trainings.train("finalist", architectures[0], self.retrain, rung)
            architectures = architectures[: self.affordable(len(architectures), first)]
        entrants = {"finalist": architectures}
        if "random" in self.settings.controls and (drawn := self._random(len(architectures))):
            entrants["random"] = drawn
        contests = {role: _Contest(role, own, steps[-compared(len(own)) :]) for role, own in entrants.items()}
        for rung in steps:
            jobs = {role: contest.jobs(rung, self.retrain) for role, contest in contests.items()}
            ahead = self._ahead(contests) if rung == steps[-1] else []
            rows = iter(self.trainings.train_all([*itertools.chain.from_iterable(jobs.values()), *ahead]))
            for role, listed in jobs.items():
                if listed:
                    contests[role].compare([next(rows) for _ in listed], self.settings.pruner)
        return contests

    def affordable(self, count: int, first: TrainingRow) -> int:
        """How many finalists there is time for, from the seconds of the first one's first steps."""
        limit = self.settings.max_time
        if limit > _LIMITED or first.problem:
            return count
        each = first.seconds / first.step * first.steps
        shares = SHARES[-compared(count) :]
        if each > limit:
            raise ValueError(
                f"`max_time` must be at least {each:.0f} s, the time of one training, got {limit:g} s. Raise it, or "
                "lower --steps."
            )
        cost_of = lambda n: max(1.0, contest_cost(n, shares) / min(n, self.workers))  # noqa: E731
        fitting = max(n for n in range(1, count + 1) if n == 1 or each * cost_of(n) <= limit)
        if fitting < count:
            say(f"finals: {limit:g} s are enough for {fitting} of {count} finalists, each of {each:.0f} s when whole")
        return fitting

    def _ahead(self, contests: Mapping[str, _Contest]) -> list[Job]:
        """What is trained after the contests, where that is known and a worker would have nothing to do meanwhile."""
        if self.workers == 1 or any(len(contest.alive) > 1 for contest in contests.values()):
            return []
        return [Job(network.role, network.architecture, network.settings) for network in self.networks(contests)]

    def networks(self, contests: Mapping[str, _Contest]) -> list[_Network]:
        """The student and its controls."""
        contest = contests["finalist"]
        student = _Network("student", contest.architecture, self.retrain, "finalist")
        return [student, *self.controls(contest, contests.get("random"))]

    def controls(self, contest: _Contest, drawn: _Contest | None) -> Iterator[_Network]:
        """The networks of the controls that the settings name, as far as there are any.

        Args:
            contest: the finalists'.
            drawn: that of as many random networks.
        """
        best, first, steps = contest.architecture, contest.architectures[0], self.retrain.recipe.steps
        others: dict[Control, Callable[[], tuple[Architecture | None, Retrain]]] = {
            "labels": lambda: (best, dataclasses.replace(self.retrain, distiller=spec(FromLabels))),
            "random": lambda: (drawn and drawn.architecture, self.retrain),
            "largest": lambda: (self._largest, self.retrain),
            "longer": lambda: (first if contest.steps > steps else None, with_length(self.retrain, contest.steps)),
            "contrast": lambda: (self._contrast(), self.retrain),
        }
        for name in self.settings.controls:
            architecture, settings = others[name]()
            if architecture is not None:
                role = "control" if name == "labels" else name
                yield _Network(_CLAIMS[name].row, architecture, settings, role)

    def _random(self, count: int) -> list[Architecture]:
        """As many random networks within the budget; fewer where there are no more.

        They are the first of the search's own random search, or else new draws.
        """
        entries = [e.architecture for e in self._searched if e.searcher == RANDOM]
        if len(entries) < count:
            rng = python_rng(self.retrain.recipe.seed, "random finalists")
            entries = list(RandomSearch(space=self.run.space, admits=self.budget.admits, rng=rng).ask(count))
        return entries[:count]

    @cached_property
    def _searched(self) -> list[Entry]:
        """What was scored, controls included; of a ranking by trainings that of the search that it predicts."""
        number = self.run.storage.search(self.number).get("of", self.number)
        return self.run.storage.ranking(number)

    @cached_property
    def _largest(self) -> Architecture:
        """The largest network within the budget."""
        entries = [e for e in self._searched if self.budget.admits(e.architecture)]
        largest = max(entries or [self.run.ranking()[0]], key=lambda entry: entry.macs)
        return largest_within(self.budget, largest.architecture)

    def _contrast(self) -> Architecture | None:
        entries = ranked([e for e in self._searched if e.searcher == CONTRAST])
        return entries[0].architecture if entries else None

    def seeds(self, networks: Sequence[_Network]) -> dict[str, list[TrainingRow]]:
        """The whole trainings of every network by its name, one per seed.

        Raises:
            ValueError: one ended early.
        """
        trained: dict[str, list[TrainingRow]] = {network.name: [] for network in networks}
        for offset in range(self.settings.seeds):
            jobs = []
            for network in networks:
                first = trained[network.name]
                role = f"{first[0].name}-seed" if first else network.role
                settings = with_length(network.settings, network.settings.recipe.steps, offset)
                jobs.append(Job(role, network.architecture, settings))
            for network, row in zip(networks, self.trainings.train_all(jobs), strict=True):
                if row.problem:
                    raise ValueError(f"the training {row.name} failed: {row.problem}")
                trained[network.name].append(row)
        return trained

    def measure(self, networks: Sequence[_Network], trained: dict[str, list[TrainingRow]]) -> dict[str, dict[str, Any]]:
        """Read the test part, after the choice, and record the closing table and the claims."""
        run, storage = self.run, self.run.storage
        rows = [teacher_result(storage, run.teacher, run.data)]
        task, grades = run.data.task, dict[str, Array]()
        for network in networks:
            if network.name != "student" and trained[network.name] == trained["student"]:
                continue
            own = grades[network.name] = np.stack([self._grades(row) for row in trained[network.name]])
            seeds = [float(value) for value in task.quality(own.mean(1))]
            rows.append(
                {
                    "name": network.name,
                    **final_measures(torch.from_numpy(own.mean(0)), run.data),
                    **cost(run.space.blueprint(network.architecture))._asdict(),
                    "seconds": round(float(np.mean([row.seconds for row in trained[network.name]])), 3),
                    "seeds": seeds,
                    "training": trained[network.name][0].name,
                }
            )
        storage.forget_controls(lambda name: name in CLAIMS)
        claims = _claims(task, grades, trained)
        if sentence := near_chance(torch.from_numpy(grades["student"].mean(0)), run.data, "the student"):
            log.warning(sentence)
            claims = {CHANCE: {"sentence": sentence}, **claims}
        storage.replace_results(rows, claims)
        folder = self.trainings.folder(trained["student"][0])
        write_pictures(storage.folder, run.data, folder, run.teacher, grades["student"][0])
        return {row["name"]: row for row in rows}

    def _grades(self, row: TrainingRow) -> Array:
        """The grades of a student on each test image; computed once, then read from `test_hits.jsonl`."""
        folder, storage = self.trainings.folder(row), self.run.storage
        weights = hashlib.sha256((current_folder(folder) / WEIGHTS).read_bytes()).hexdigest()
        for line in storage.lines(HITS, _Grades):
            if line["weights"] == weights:
                return self._read(line)
        grades = student_grades(folder, self.run.data)
        storage.add(HITS, [{"training": row.name, "weights": weights, **_packed(grades)}])
        return grades.astype(float)

    def _read(self, line: Mapping[str, Any]) -> Array:
        """The grades in a line, one for each test image."""
        images = len(self.run.data.test)
        try:
            grades = _unpacked(line)
        except (ValueError, TypeError) as error:  # what numpy says of wrong sizes and types
            raise Damaged(self.run.storage.path(HITS), f"cannot be read ({error})", _ANEW) from error
        if len(grades) != images or not np.isfinite(grades).all():
            reason = f"has no grade for each of {images} test images of {line['training']}"
            raise Damaged(self.run.storage.path(HITS), reason, _ANEW)
        return grades


def _packed(grades: NDArray[Any]) -> dict[str, Any]:
    """Grades `[images, ...]` as plain JSON."""
    count, *grade = grades.shape
    if grades.dtype == bool and not grade:
        return {"images": count, "hits": np.packbits(grades).tobytes().hex()}
    dtype = grades.dtype.newbyteorder("<")
    return {"images": count, "hits": grades.astype(dtype).tobytes().hex(), "grade": grade, "dtype": dtype.str}


def _unpacked(line: Mapping[str, Any]) -> Array:
    """What `_packed` was given, as float64."""
    content = bytes.fromhex(line["hits"])
    if "grade" not in line:
        if len(content) != math.ceil(line["images"] / 8):
            raise ValueError(f"{len(content)} bytes for {line['images']} images")
        return np.unpackbits(np.frombuffer(content, np.uint8), count=line["images"]).astype(float)
    return np.frombuffer(content, line["dtype"]).reshape(line["images"], *line["grade"]).astype(float)


def _claims(task: Task, hits: dict[str, Array], trained: dict[str, list[TrainingRow]]) -> dict[str, dict[str, Any]]:
    """What the test images say about the student beside each control, and first what it loses to the best of them."""
    claims: dict[str, dict[str, Any]] = {}
    taught: dict[float, tuple[str, dict[str, Any]]] = {}
    for claim in _CLAIMS.values():
        if claim.row not in trained:
            continue
        if trained[claim.row] == trained["student"]:
            claims[claim.name] = {"sentence": f"The student is also {claim.words}."}
            continue
        compared = compare_accuracy(
            "student", hits["student"], hits[claim.row], claim.words, claim.otherwise, **task.claims
        )
        claims[claim.name] = compared
        if claim.name != "distillation":
            taught.setdefault(compared["value"], (claim.words, compared))
    if not taught:
        return claims
    words, worst = taught[min(taught)]
    lost, low, high = (0.0 - value for value in (worst["value"], *reversed(worst["interval"])))
    sentence = f"Points lost to the best control, {words}: {100 * lost:.2f} [{100 * low:.2f}, {100 * high:.2f}]."
    if low <= 0 <= high:
        sentence += " They are not distinguishable from none."
    return {LOST: {"value": lost, "interval": [low, high], "sentence": sentence}, **claims}
