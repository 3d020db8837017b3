"""A search's networks ranked by the trainings of a few of them."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from kdnas.architecture import Architecture
from kdnas.jobs._lengths import LENGTHS, ROLE, SEEDS, Length, shortest_length
from kdnas.jobs._preflight import duration
from kdnas.jobs._run import Run
from kdnas.jobs._trainings import Job, Trainings, with_length
from kdnas.jobs._workers import Workers, check_workers
from kdnas.jobs.search import search
from kdnas.ranking.order import finalists, ranked
from kdnas.ranking.quality import read_table
from kdnas.runs.entry import RANDOM, Entry
from kdnas.runs.folder import IMPORTED
from kdnas.scorers._features import Features, choices, similarities, sizes
from kdnas.scorers._predictor import Beliefs, Predictor, fit
from kdnas.scorers.base import score_all
from kdnas.scorers.blocks import Blocks
from kdnas.scorers.rank_ensemble import rank_among
from kdnas.settings import Retrain, Search
from kdnas.specs import spec
from kdnas.statistics import kendall
from kdnas.tables import structure, unstructure
from kdnas.values import Share

say = logging.getLogger(__name__).info

TRAININGS = "trainings"
"""The control of a search that says what its trainings showed; and the scorer of entries that are predicted."""

_BATCH = 4  # trainings chosen at once, however many go side by side
_FIRST = 5  # the first trainings are those of the best networks by score, kept apart
_LEAST = 3  # results below which nothing can be fitted


class Result(NamedTuple):
    """The accuracy of a trained network.

    Attributes:
        architecture: the network.
        accuracy: on the search part, or of an imported file.
        is_own: whether it was trained in this run.
    """

    architecture: Architecture
    accuracy: float
    is_own: bool


@final
@dataclass(frozen=True)
class ImportedRow:
    """A line of `imported.jsonl`: the accuracy of a network that was trained elsewhere.

    Attributes:
        code: of the architecture.
        accuracy: in [0, 1].
        file: name of the file that it was read from.
    """

    code: str
    accuracy: Share
    file: str


def predict(
    run: Run,
    settings: Search,
    count: int = 0,
    *,
    results: Path | None = None,
    quality: bool = True,
    workers: int | None = None,
) -> list[Entry]:
    """Rank a search's networks by trainings; appends a search of predicted accuracies, and returns it, best first.

    The search itself is that of `settings`: the run's last one where it has the same, else a new one. Networks are
    trained as `kdnas retrain` trains a student, with the run's settings and the length that `shortest_length` chooses:
    first the best by score that differ in their choices, then, four at a time, those of largest expected improvement
    over the best predicted accuracy (the later ones of four as if the earlier had what is predicted of them), until
    there are as many results as asked for, or one more is expected to gain less than the noise of a training, where
    that was measured. Results of earlier searches and imported ones count. Each entry's
    score is its predicted accuracy, with the ends of its 90 % interval (`low`, `high`) and the score before (`score`)
    among its parts.

    The same call resumes; no network is trained twice for as many steps and with the same seed.

    Args:
        run: a run with a trained supernet, or whose scorer needs none.
        settings: of the search.
        count: number of trained networks in all, earlier and imported ones included.
        results: a CSV file of accuracies, with codes in the column `arch` (or the first one) and accuracies, in [0, 1]
            or percent, in `accuracy` (or `mean_acc`); its rows are stored in the run.
        quality: whether to measure first how long trainings must be; else they are as long as a student's.
        workers: number of trainings side by side; by default see `default_workers`. No result depends on it.

    Raises:
        ValueError: as `search`; the file is no such table; or there are fewer than 3 results or networks.
    """
    if results is not None:
        _import(run, results)
    number = _searched(run, settings)
    with Workers(run, check_workers(run, workers)) as processes:
        return _ranked_by(_Predictions(run, number, Trainings(run, processes)), count, quality=quality)


def shared_predict(
    run: Run, settings: Search, count: int, url: str, *, results: Path | None = None, quality: bool = True
) -> list[Entry]:
    """As `predict`, together with all processes, on any hosts, that were given the same run, settings and storage.

    The first process leads: it searches, where that is not done, predicts and records; all take trainings. See
    `kdnas.jobs.finals.shared_finals`.

    Args:
        run: as `predict`, in the folder that all processes share.
        settings: as `predict`.
        count: as `predict`.
        url: of a database for Optuna, such as `postgresql://me@host/name`.
        results: as `predict`.
        quality: as `predict`.

    Raises:
        ValueError: as `predict`; or as `shared_finals`.
    """
    from kdnas.jobs import _shared  # SQLAlchemy: half a second

    _shared.check_named(run.storage.manifest["job"])
    train = _shared.trains(run)

    def lead(board: Any) -> list[Entry]:
        if results is not None:
            _import(run, results)
        trainings = Trainings(run, _shared.SharedAnswers(board, train))
        return _ranked_by(_Predictions(run, _searched(run, settings), trainings), count, quality=quality)

    plain = {"settings": unstructure(settings), "count": count, "quality": quality}
    name = f"kdnas trainings {_shared.identity(run, **plain)}"
    entries = _shared.led_run(run, url, name, train, lead, shares=True)
    return list(run.ranking()) if entries is None else entries


def _ranked_by(job: "_Predictions", count: int, *, quality: bool) -> list[Entry]:
    known = len({result.architecture for result in job.results(job.known_length)})
    length = job.known_length if known >= max(count, _LEAST) else job.length(count, quality=quality)
    if length is None:
        return ranked(job.entries)
    stopped = job.buy(count, length)
    return job.record(length, stopped)


def _searched(run: Run, settings: Search) -> int:
    """The number of a finished search with these settings: the last one's, or of the one that it predicts; or new."""
    storage = run.storage
    last = len(storage.manifest.get("searches", []))
    last = storage.search(last).get("of", last) if last else 0
    if last and storage.search(last) == {"settings": unstructure(settings), "state": "done"}:
        return last
    search(run, settings)
    number: int = storage.require("search", f"kdnas search {run.folder}")["search"]
    return number


def _import(run: Run, path: Path) -> None:
    """Store the rows of a table of accuracies in the run, each once."""
    rows = read_table(path, run.space, ("accuracy", "mean_acc"), least=1)
    percent = any(row.truth > 1 for row in rows)
    accuracies = [row.truth / 100 if percent else row.truth for row in rows]
    for row, accuracy in zip(rows, accuracies, strict=True):
        if not 0 <= accuracy <= 1:
            raise ValueError(f"{path}: accuracies must be in [0, 1] or in percent, got {row.truth:g} for {row.code}.")
    there = {(line["code"], line["accuracy"]) for line in run.storage.lines(IMPORTED, ImportedRow)}
    lines = [
        dataclasses.asdict(ImportedRow(run.space.code(row.architecture), accuracy, path.name))
        for row, accuracy in zip(rows, accuracies, strict=True)
    ]
    run.storage.add(IMPORTED, [line for line in lines if (line["code"], line["accuracy"]) not in there])


@final
@dataclass
class _Predictions:
    """The networks of one search, and what their trainings say.

    Attributes:
        number: of the search.
    """

    run: Run
    number: int
    trainings: Trainings

    @cached_property
    def settings(self) -> Search:
        """The search's."""
        return structure(self.run.storage.search(self.number)["settings"], Search)

    @cached_property
    def retrain(self) -> Retrain:
        """The longest training: that of a student."""
        return self.run.experiment.retrain

    @cached_property
    def entries(self) -> list[Entry]:
        """The search's entries and those of its random control, best first, each network once."""
        listed = [e for e in self.run.storage.ranking(self.number) if not e.is_control or e.searcher == RANDOM]
        return list({entry.architecture: entry for entry in reversed(ranked(listed))}.values())[::-1]

    @property
    def known_length(self) -> Length:
        """What was measured of lengths in this run, or a student's length."""
        record = self.run.storage.phase(LENGTHS)
        steps = self.retrain.recipe.steps
        if record is None or record["recipe"] != steps or not record["steps"]:
            return Length(steps, None if record is None else record["noise"].get(str(steps)))
        return Length(record["steps"], record["noise"][str(record["steps"])])

    def length(self, count: int, *, quality: bool) -> Length | None:
        """The length of the trainings to come; None where none tells networks apart."""
        if len(self.entries) < _LEAST:
            raise ValueError(
                f"`trainings` needs a search of at least {_LEAST} networks, got {len(self.entries)}. Raise the budget "
                "or --num-evaluations."
            )
        if not (count and quality):
            return self.known_length
        return shortest_length(self.trainings, self.retrain, self.entries, count)

    def results(self, length: Length) -> list[Result]:
        """All accuracies of the run's networks after so many steps, and the imported ones."""
        space = self.run.space
        results = []
        for code in dict.fromkeys(row.code for row in self.trainings.rows):
            architecture = space.parse(code)
            for seed in range(SEEDS):
                rows = self.trainings.of(architecture, with_length(self.retrain, length.steps, seed))
                if rows and rows[-1].step == rows[-1].steps and rows[-1].accuracy is not None:
                    results.append(Result(architecture, rows[-1].accuracy, True))
        lines = self.run.storage.lines(IMPORTED, ImportedRow)
        return results + [Result(space.parse(line["code"]), line["accuracy"], False) for line in lines]

    def buy(self, count: int, length: Length) -> str:
        """Train networks until there are `count` results, or one more gains too little; returns why it stopped."""
        settings = with_length(self.retrain, length.steps)
        attempted: set[Architecture] = set()
        announced = False
        while True:
            results = self.results(length)
            trained = {result.architecture for result in results}
            missing = count - len(trained)
            if missing <= 0:
                return f"there are {len(trained)} trained networks"
            candidates = [e.architecture for e in self.entries if e.architecture not in trained | attempted]
            if not candidates:
                return "every network of the search is trained"
            first = min(_FIRST, count) - len(trained)
            if first > 0 or len(results) < _LEAST:
                apart = [e.architecture for e in finalists(self.entries, _FIRST) if e.architecture in candidates]
                chosen = list(dict.fromkeys([*apart, *candidates]))[: max(1, first)]
            else:
                chosen = self._next(candidates, results, min(_BATCH, missing), length.noise or 0.0)
                if not chosen:
                    return (
                        f"one more training is expected to gain less than the noise of {100 * (length.noise or 0):.2f} "
                        "points"
                    )
            if not announced:
                each = self.trainings.seconds_of(chosen[0], settings)
                say(f"trainings: up to {missing} of {length.steps:,} steps, roughly {duration(each * missing)}")
                announced = True
            attempted.update(chosen)
            self.trainings.train_all([Job(ROLE, architecture, settings) for architecture in chosen])

    def _next(
        self, candidates: Sequence[Architecture], results: Sequence[Result], count: int, least: float
    ) -> list[Architecture]:
        """Candidates of largest expected improvement over the best prediction, of at least so much.

        Each is chosen as if those before it had what is predicted of them.
        """
        chosen: list[Architecture] = []
        results, candidates = list(results), list(candidates)
        while candidates and len(chosen) < count:
            gains, means = self._gains(candidates, results)
            place = int(np.argmax(gains))
            if gains[place] < least:
                break
            chosen.append(candidates.pop(place))
            results.append(Result(chosen[-1], float(means[place]), True))
        return chosen

    def _gains(self, candidates: Sequence[Architecture], results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
        """Expected improvement of candidates over the best prediction, and their predicted accuracies."""
        predictor = self.fitted(results, falls_back=False)
        best = float(self._predicted(predictor, [e.architecture for e in self.entries], results).mean.max())
        features, scores = self._known(candidates, results)
        return predictor.improvement(features.values, best, scores), predictor.believe(features.values, scores).mean

    def fitted(self, results: Sequence[Result], *, falls_back: bool = True) -> Predictor:
        """The predictor of accuracies, fitted to results; see `fit`.

        Raises:
            ValueError: fewer than 3 results.
        """
        if len(results) < _LEAST:
            raise ValueError(
                f"a ranking by trainings needs at least {_LEAST} results, got {len(results)}. Raise --trainings, or "
                "add rows to --results."
            )
        features, scores = self._known([r.architecture for r in results], results, own=[r.is_own for r in results])
        accuracies = [r.accuracy for r in results]
        return fit(
            features.values,
            accuracies,
            "gaussian_process",
            groups=features.groups,
            score=scores,
            # Other measures than shares of the images may be negative.
            unit="accuracy" if all(0 <= accuracy <= 1 for accuracy in accuracies) else "any",
            falls_back=falls_back,
        )

    def _predicted(
        self, predictor: Predictor, architectures: Sequence[Architecture], results: Sequence[Result]
    ) -> Beliefs:
        features, scores = self._known(architectures, results)
        return predictor.believe(features.values, scores)

    def _known(
        self, architectures: Sequence[Architecture], results: Sequence[Result], own: Sequence[bool] | None = None
    ) -> tuple[Features, np.ndarray]:
        """Features and prior scores of networks; where they are trained is a feature, as results may differ by it."""
        here = any(result.is_own for result in results)
        origin = np.array([[float(here)]] * len(architectures) if own is None else [[float(o)] for o in own])
        missing = [a for a in dict.fromkeys(architectures) if a not in self._table]
        if missing:
            self._add(missing)
        rows = [self._table[architecture] for architecture in architectures]
        parts = [np.array([row[part] for row in rows]) for part in range(3)]
        return Features.of(*parts, origin), np.array([row[3] for row in rows])

    @cached_property
    def _table(self) -> dict[Architecture, tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
        """Choices, size, similarities and rank by score of every network that is asked for."""
        return {}

    def _add(self, architectures: Sequence[Architecture]) -> None:
        """Compute rows of the table; at first those of the whole search, which share prefixes."""
        if not self._table:
            architectures = list(dict.fromkeys([*(e.architecture for e in self.entries), *architectures]))
        run, scores = self.run, {entry.architecture: entry.score for entry in self.entries}
        known = np.sort(list(scores.values()))
        missing = [a for a in architectures if a not in scores]
        if missing:
            source = spec(Blocks) if self.settings.exact else self.settings.scorer
            scored = score_all(run.supernet, missing, run.scorer(source), self._evidence)
            scores |= {a: score.value for a, score in zip(missing, scored, strict=True)}
        alike = np.zeros((len(architectures), 0))
        if run.experiment.train.distiller is not None:
            alike = similarities(run.supernet, architectures, self._evidence)
        columns = choices(run.space, architectures), sizes(run.space, architectures), alike
        for place, architecture in enumerate(architectures):
            rank = rank_among(scores[architecture], known)
            self._table[architecture] = (columns[0][place], columns[1][place], columns[2][place], rank)

    @cached_property
    def _evidence(self) -> Any:
        return self.run.evidence(self.settings.num_images, self.settings.seed)

    def record(self, length: Length, stopped: str) -> list[Entry]:
        """Append the predicted ranking as a search of its own, and say what it is worth."""
        began, storage = time.perf_counter(), self.run.storage
        results = self.results(length)
        predictor = self.fitted(results)
        beliefs = self._predicted(predictor, [e.architecture for e in self.entries], results)
        searches: list[dict[str, Any]] = storage.manifest["searches"]
        basis = {"of": self.number, "results": len(results), "steps": length.steps}
        same = {name: searches[-1].get(name) for name in basis} == basis
        if same and searches[-1].get("state") == "done":
            return ranked(storage.ranking(len(searches)))
        if not same:
            settings = storage.search(self.number)["settings"]
            searches.append({"settings": settings, "state": "predicting", **basis})
            storage.save()
        number = len(searches)
        there = {entry.architecture for entry in storage.ranking(number)}
        entries = [
            dataclasses.replace(
                entry,
                score=round(float(mean), 6),
                parts={"low": round(float(low), 6), "high": round(float(high), 6), "score": entry.score},
                scorer=TRAININGS,
                searcher=TRAININGS,
                search=number,
                share=1.0,
            )
            for entry, mean, low, high in zip(self.entries, *beliefs, strict=True)
        ]
        storage.append([entry for entry in entries if entry.architecture not in there])
        storage.record_controls({TRAININGS: self._claim(predictor, results, length, stopped, ranked(entries)[0])})
        searches[-1]["state"] = "done"
        before = storage.require("search", f"kdnas search {self.run.folder}")
        seconds = round(before["seconds"] + time.perf_counter() - began, 3)
        storage.finish("search", **{**before, "seconds": seconds, "stopped": stopped, "search": number})
        return ranked(entries)

    def _claim(
        self, predictor: Predictor, results: Sequence[Result], length: Length, stopped: str, first: Entry
    ) -> dict[str, Any]:
        """What the trainings showed: value, interval and sentence of a control."""
        trained = {result.architecture for result in results}
        left = [e.architecture for e in self.entries if e.architecture not in trained]
        gain = float(self._gains(left, results)[0].max()) if left else 0.0
        measures = self.run.data.task.measures
        sentence = (
            f"{len(trained)} trained networks, {length.steps:,} steps each where trained here: {measures} predicted by "
            f"the others have tau {predictor.tau:.2f} with the measured ones and an error of "
            f"{100 * predictor.error:.2f} points; the score's tau is {predictor.score_tau or 0.0:.2f}."
        )
        if predictor.falls_back:
            sentence += " Choices, size and similarities add nothing to the score yet, so its order is kept."
        noise = predictor.noise if length.noise is None else length.noise
        sentence += (
            f" Place 1 is expected to have {first.score:.2%} [{first.parts['low']:.2%}, {first.parts['high']:.2%}] on "
            f"the search part. One more training is expected to gain {100 * gain:.2f} points; the noise of a training "
            f"is {100 * noise:.2f}{' as fitted' if length.noise is None else ', measured over seeds'}."
        )
        return {"value": gain, "noise": noise, "sentence": sentence, "stopped": stopped}


def beliefs_of(run: Run, architectures: Sequence[Architecture]) -> dict[str, Any] | None:
    """What the trainings of a run say of a network and of what differs from it; None where there are none.

    Args:
        run: the run.
        architectures: the network, then others.

    Returns:
        `results`, `measure`, `falls_back`, `accuracy`, `low` and `high` of the first network, and `changes`: of every
        other one the predicted difference of accuracy, or of the task's measure, with the ends of its 90 % interval.
    """
    searches = run.storage.manifest["searches"]
    of = next((search["of"] for search in reversed(searches) if "of" in search), None)
    if of is None:
        return None
    job = _Predictions(run, of, Trainings(run))
    results = job.results(job.known_length)
    predictor = job.fitted(results)
    features, scores = job._known(architectures, results)
    own = predictor.believe(features.values[:1], scores[:1])
    changes = predictor.compare(features.values, scores)
    return {
        "results": len(results),
        "measure": run.data.task.measure,
        "falls_back": predictor.falls_back,
        "tau": kendall(predictor.left_out, [r.accuracy for r in results]),
        **{name: float(value[0]) for name, value in zip(("accuracy", "low", "high"), own, strict=True)},
        "changes": [[float(value) for value in change] for change in zip(*changes, strict=True)][1:],
    }
