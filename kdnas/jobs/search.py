"""Search within a budget, with its controls."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, final

from kdnas.architecture import Architecture
from kdnas.costs.check import BudgetCheck, check_feasible
from kdnas.costs.latency import LatencyTable, calibration_networks
from kdnas.costs.target import Target
from kdnas.jobs._block_rating import best_networks
from kdnas.jobs._checks import check_search
from kdnas.jobs._run import Run
from kdnas.jobs._scoring import SideBySide, scored
from kdnas.jobs._trainings import one_thread
from kdnas.jobs._workers import Workers, check_workers
from kdnas.jobs.export import check_architectures
from kdnas.randomness import python_rng
from kdnas.ranking import controls
from kdnas.ranking.early_stopping import EarlyStopping
from kdnas.ranking.loop import Evaluator, SearchLimits, run_search
from kdnas.ranking.order import ranked
from kdnas.runs.entry import CONTRAST, RANDOM, Entry
from kdnas.runs.folder import LATENCIES, RunFolder
from kdnas.runs.progress import progress
from kdnas.scorers.base import Evidence, LayerCount, Score, Scorer
from kdnas.scorers.blocks import Blocks
from kdnas.searchers.base import Searcher
from kdnas.searchers.random_search import RandomSearch
from kdnas.settings import Search
from kdnas.specs import Spec, spec
from kdnas.supernet import Supernet
from kdnas.tables import unstructure

log = logging.getLogger(__name__)
say = log.info

FLUSH_SECONDS = 1.0  # between writings of scores, so that a kill costs little
_REMEASURED = 5
_SEARCH = "search"


Elsewhere = Callable[[str, Spec], Evaluator]
"""(`search` or `contrast`, its scorer) to what computes such scores in other processes."""


def search(
    run: Run, settings: Search, *, workers: int | None = None, elsewhere: Elsewhere | None = None
) -> list[Entry]:
    """Rank subnets of a trained run; appends to its ranking and returns this search's entries, best first.

    An interrupted search with the same settings is resumed: its scores are replayed to the searcher. Unless
    `settings.control` is off, a random search of equally many evaluations follows as a control. The search and each of
    its controls have an equal part of `settings.max_time`, and controls also what is left by those before. An exact
    search ranks the best networks only, so correlations of score and size are measured on the random ones.

    With a pruner, evaluations may be stopped early. The random search then has no pruner and as many whole evaluations
    as those of the search cost in total; correlations with sizes are measured on whole evaluations.

    Args:
        run: with a trained supernet, where the scorer reads weights.
        settings: scorer, searcher, budget and limits.
        workers: number of processes that score side by side, each on one thread of a CPU. The ranking is that of one
            worker to the last bit. By default this process scores, on as many threads as torch has.
        elsewhere: what scores instead; see `shared_search`.

    Raises:
        Infeasible: no network is within the budget; the nearest is named.
        Uninformative: the score has too few distinct values to rank candidates.
        ValueError: the run has no trained supernet or, for an exact search, none trained block-wise; or several workers
            with a pruner, an exact search, or a teacher or data in this process.
    """
    if workers is not None:
        if workers > 1:
            _check_alone(settings, "workers")
        with Workers(run, check_workers(run, workers)) as processes, one_thread():

            def by_workers(name: str, scorer: Spec) -> Evaluator:
                return SideBySide(processes, scorer, settings.num_images, settings.seed)

            return search(run, settings, elsewhere=by_workers if workers > 1 else None)
    plan = _plan(run, settings, elsewhere)
    if plan.division:
        say(f"time: {plan.division}")
    entries, stopped = plan.exact() if settings.exact else plan.search()
    if not entries:
        raise ValueError(
            f"no network with {settings.budget} was found ({stopped}). Raise the budget or --max-time, or use another "
            "searcher."
        )
    if len(entries) > 1 and len({entry.score for entry in entries}) == 1:
        log.warning(
            f"all {len(entries)} scores are {entries[0].score:g}, so their order says nothing. Use another scorer, "
            "more search images, or a supernet that is trained longer."
        )
    plan.record(entries, stopped, plan.controls(entries))
    return ranked(entries)


def shared_search(run: Run, settings: Search, url: str) -> list[Entry]:
    """As `search`, together with all processes, on any hosts, that were given the same run, settings and storage.

    The first process leads: it runs the searcher and records the ranking in its folder. The others score parts, and
    end with it. The ranking is that of one process with one thread on the same kind of CPU, to the last bit. What a
    process had in hands that is not heard of for 30 seconds is scored by another; where it led, another leads.

    Args:
        run: the run, or a copy of it.
        settings: as `search`.
        url: of a database for Optuna, such as `postgresql://me@host/name`.

    Returns:
        The entries, best first; none in a process that did not lead and has a copy of the run.

    Raises:
        ValueError: as `search`; or the storage cannot be used, or the process that leads was stopped.
    """
    from kdnas.jobs import _shared  # SQLAlchemy: half a second

    _check_alone(settings, "storage")
    check_search(settings, run.space, run.experiment.train.distiller)
    _shared.check_named(run.storage.manifest["job"])
    number, _ = _number(run.storage, unstructure(settings))
    name = f"kdnas search {_shared.identity(run, settings=unstructure(settings), number=number)}"
    answer = _shared.scores(scores_here(run, settings))

    def lead(board: Any) -> list[Entry]:
        shared = _shared.SharedSearch(board, run.space, answer)
        return search(run, settings, elsewhere=lambda name, _: shared.of(name))

    with one_thread():
        entries = _shared.led_run(run, url, name, answer, lead, shares=False)
    if entries is None:
        return ranked([e for e in run.storage.ranking(number) if not e.is_control])
    return entries


def _check_alone(settings: Search, option: str) -> None:
    if settings.pruner is not None or settings.exact:
        kind = "an exact search" if settings.exact else "a search with a pruner"
        raise ValueError(f"`{option}` does not go with {kind}: it takes one step after another. Drop one of them.")


def scores_here(run: Run, settings: Search) -> Callable[[str, Sequence[str]], dict[str, Any]]:
    """Scores of candidates by this process, under the search's own scorer or its contrast."""
    sources = {_SEARCH: settings.scorer} | ({CONTRAST: settings.contrast} if settings.contrast else {})
    evidence = cache(lambda: run.evidence(settings.num_images, settings.seed))
    scorer = cache(lambda name: run.scorer(sources[name]))
    return lambda name, codes: scored(run, scorer(name), evidence(), codes)


@final
@dataclass
class _Plan:
    """A search and its controls: their common settings and state.

    Attributes:
        scorer: that of the search.
        number: 1-based index of the search within the run.
        interruption: how many scores were recorded before this command, in words; empty where none were.
        recorded: recorded entries of this search and of the previous one.
        began: start, by `time.perf_counter`.
        elsewhere: what scores instead of this process.
    """

    run: Run
    settings: Search
    supernet: Supernet
    budget: BudgetCheck
    evidence: Evidence
    scorer: Scorer
    number: int
    recorded: list[Entry]
    began: float
    elsewhere: Elsewhere | None = None
    layer_count: LayerCount = field(default_factory=LayerCount)
    interruption: str = field(init=False)

    def __post_init__(self) -> None:
        before = sum(entry.search == self.number for entry in self.recorded)
        self.interruption = f", without those of {before} scores before an interruption" if before else ""

    @property
    def seconds_left(self) -> float:
        return self.settings.max_time - (time.perf_counter() - self.began)

    @property
    def control_names(self) -> list[str]:
        """The searches beside the search itself, each of which has an equal part of the time."""
        settings = self.settings
        return ["random search"] * settings.control + ["the contrast"] * (settings.contrast is not None)

    @property
    def division(self) -> str:
        """What `max_time` is divided into, in words; empty where it is not limited."""
        parts = ["the search"] * (not self.settings.exact) + self.control_names
        if self.settings.max_time >= Search.max_time or not parts:
            return ""
        whole = f"{self.settings.max_time:g} s"
        return (
            f"{whole} in {len(parts)} equal parts: {', '.join(parts)}" if len(parts) > 1 else f"{whole} for {parts[0]}"
        )

    def search(self) -> tuple[list[Entry], str]:
        """Entries of the search itself, and why it stopped; its share of the time is equal to each control's."""
        settings, seconds = self.settings, self.seconds_left / (1 + len(self.control_names))
        count = settings.num_evaluations
        entries, stopped = self._searched(_SEARCH, settings.searcher, settings.scorer, self.scorer, seconds, count)
        return entries, f"{stopped} ({self.division})" if self.division else stopped

    def exact(self) -> tuple[list[Entry], str]:
        """As `search`, with the best networks of a block-wise rating."""
        entries, instead = best_networks(self.run, self.settings, self.evidence, self.number)
        earlier = self._earlier("exact")
        self._append([e for e in entries if e.architecture not in earlier])
        stopped = f"every path of every block was rated, {instead}, and the search over their sums is exact"
        return [earlier.get(e.architecture, e) for e in entries], stopped

    def controls(self, entries: list[Entry]) -> dict[str, dict[str, Any]]:
        """The controls by name, of as many evaluations as the search cost, while there is time."""
        settings, by_name = self.settings, dict[str, dict[str, Any]]()
        random_entries: list[Entry] = []
        count = max(1, math.ceil(sum(e.share for e in entries) - 1e-9))
        if settings.pruner is not None:
            by_name["stopping"] = controls.early_stopping(entries)
        if settings.control and (left := self.seconds_left) > 0:
            seconds = left / len(self.control_names)
            random_entries, _ = self._searched(RANDOM, spec(RandomSearch), settings.scorer, self.scorer, seconds, count)
            by_name["random search"] = controls.random_search(entries, random_entries, count)
        elif settings.control:
            by_name["random search"] = {"sentence": "Random search at equal cost is left out: the time is over."}
        if settings.contrast is not None:
            by_name["contrast"] = self._contrast(settings.contrast, entries)
        whole = [e for e in entries if e.share == 1] or entries
        sample = random_entries if settings.exact and len(random_entries) > 1 else whole
        free = controls.training_free(sample, self.run.space, self.evidence, self.seconds_left)
        if (table := self.budget.table) is not None:
            first, bound = ranked(entries)[:_REMEASURED], settings.budget.latency or math.inf
            by_name["latency"] = controls.measured_latency(first, table, self.run.space, bound)
        return controls.sizes(sample) | free | by_name

    def record(self, entries: list[Entry], stopped: str, by_name: dict[str, dict[str, Any]]) -> None:
        """Record the controls and the end of the search."""
        storage = self.run.storage
        storage.record_controls(by_name)
        storage.manifest["searches"][-1]["state"] = "done"
        before = (storage.phase("search") or {}).get("seconds", 0.0)
        storage.finish(
            "search",
            seconds=round(before + time.perf_counter() - self.began, 3),
            evaluations=len(entries),
            stopped=stopped,
            saved=f"{self.layer_count}{self.interruption}",
            budget=self.settings.budget.bounds(),
            search=self.number,
        )

    def _contrast(self, contrast: Spec, entries: list[Entry]) -> dict[str, Any]:
        left = self.seconds_left
        if left <= 0:
            return {"sentence": "The contrast is left out: the time is over."}
        try:
            scorer = self.run.scorer(contrast)
            others, _ = self._searched(CONTRAST, self.settings.searcher, contrast, scorer, left, len(entries))
            both = self.scorer, scorer
            return controls.contrast(
                entries, others, both, str(contrast), self.supernet, self.evidence, self.seconds_left
            )
        except ValueError as error:  # the search itself has ended well
            return {"sentence": f"The contrast is left out: {error}"}

    def _searched(
        self, purpose: str, searcher_spec: Spec, scorer_spec: Spec, scorer: Scorer, seconds: float, evaluations: int
    ) -> tuple[list[Entry], str]:
        """Entries of one searcher, and why it stopped; recorded scores are replayed, new ones are recorded."""
        settings, run = self.settings, self.run
        # The contrast has the random numbers of the search: only the scores differ.
        rng = python_rng(settings.seed, "control" if purpose == RANDOM else "search")
        searcher = searcher_spec.build(Searcher, space=run.space, admits=self.budget.admits, rng=rng)
        labels = (scorer_spec.name, searcher_spec.name if purpose == _SEARCH else purpose, self.number)
        earlier = self._earlier(labels[1])
        entries: list[Entry] = []
        waiting: list[Entry] = []
        stopped = ""
        name = CONTRAST if purpose == CONTRAST else _SEARCH
        evaluate = None if self.elsewhere is None else self.elsewhere(name, scorer_spec)
        flushed = time.perf_counter()
        with progress(purpose, evaluations) as bar:
            for entry in run_search(
                self.supernet,
                scorer,
                searcher,
                self.evidence,
                SearchLimits(evaluations, seconds),
                known=self._known(purpose, labels[1]),
                labels=labels,
                layer_count=self.layer_count,
                stopping=EarlyStopping(settings.pruner, scorer) if settings.pruner and purpose != RANDOM else None,
                first=self._best_before(purpose) if settings.initial and purpose != RANDOM else (),
                after_tell=_traced(searcher, run.storage, f"{purpose} {self.number}", evaluations),
                evaluate=evaluate,
            ):
                if isinstance(entry, str):
                    stopped = entry
                    continue
                entry = dataclasses.replace(entry, spent=self.budget.measured(entry.architecture))
                entries.append(earlier.get(entry.architecture, entry))
                if entry.architecture not in earlier:
                    waiting.append(entry)
                if time.perf_counter() - flushed > FLUSH_SECONDS or len(waiting) >= 100:
                    self._append(waiting)
                    waiting, flushed = [], time.perf_counter()
                bar.update(len(entries), f"best {max(e.score for e in entries):.4f}")
        self._append(waiting)
        return entries, stopped

    def _earlier(self, searcher: str) -> dict[Architecture, Entry]:
        """Recorded entries of one searcher of this search, from before an interruption."""
        return {e.architecture: e for e in self.recorded if e.search == self.number and e.searcher == searcher}

    def _known(self, purpose: str, searcher: str) -> dict[Architecture, Score]:
        """Recorded scores of this search by the same scorer, which need no evaluation."""
        entries = [e for e in self.recorded if e.search == self.number and _same_score(e, purpose)]
        if self.settings.pruner is not None:  # its decisions depend on the order, so they hold for its own searcher
            entries = [e for e in entries if e.searcher == searcher or (purpose == RANDOM and e.share == 1)]
        return {e.architecture: Score(e.score, e.parts, e.share) for e in entries}

    def _best_before(self, purpose: str) -> list[Architecture]:
        """The best networks of the previous search within the budget; by the same score where it has such entries."""
        before = [e for e in self.recorded if e.search == self.number - 1 and e.searcher != RANDOM]
        before = [e for e in before if self.budget.admits(e.architecture)]
        same = [e for e in before if _same_score(e, purpose)]
        return [e.architecture for e in ranked(same or before)][: self.settings.initial]

    def _append(self, entries: list[Entry]) -> None:
        self.run.storage.append(entries)
        self.recorded += entries


def _number(storage: RunFolder, settings: dict[str, Any]) -> tuple[int, bool]:
    """The 1-based number of a search of a run, and whether it is an interrupted one that goes on."""
    searches: list[dict[str, Any]] = storage.manifest.get("searches", [])
    is_resumed = bool(searches) and searches[-1] == {"settings": settings, "state": "running"}
    number = len(searches) if is_resumed else max([len(searches), *(e.search for e in storage.ranking())]) + 1
    return number, is_resumed


def _plan(run: Run, settings: Search, elsewhere: Elsewhere | None) -> _Plan:
    """Validate everything before anything is written, then enter the search in the manifest."""
    storage = run.storage
    check_search(settings, run.space, run.experiment.train.distiller)
    if settings.exact:
        settings = dataclasses.replace(settings, scorer=spec(Blocks))
    supernet = run.supernet
    budget = BudgetCheck(run.space, settings.budget, partial(latency_table, run, settings.budget.target))
    tested = time.perf_counter()
    check_feasible(budget, python_rng(settings.seed, "feasible"), seconds=settings.max_time)
    testing = time.perf_counter() - tested
    evidence = run.evidence(settings.num_images, settings.seed)
    scorer = run.scorer(settings.scorer)
    plain = unstructure(settings)
    number, is_resumed = _number(storage, plain)
    if settings.initial and number == 1:
        raise ValueError("`initial` must be 0 in the first search of a run: there is no earlier search to start from.")
    if not is_resumed:
        storage.manifest.setdefault("searches", []).append({"settings": plain, "state": "running"})
        storage.save()
    storage.forget_controls(lambda name: name.startswith("tau ") or name in controls.SEARCH_CONTROLS)
    recorded = [e for e in storage.ranking() if e.search in (number, number - 1)]
    check_architectures(run, recorded)
    settings = dataclasses.replace(settings, budget=budget.budget)  # shares as numbers
    began = time.perf_counter() - testing
    return _Plan(run, settings, supernet, budget, evidence, scorer, number, recorded, began, elsewhere)


def _same_score(entry: Entry, purpose: str) -> bool:
    return (entry.searcher == CONTRAST) == (purpose == CONTRAST)


def latency_table(run: Run, target: Target) -> LatencyTable:
    """The run's latency table of a target; rows are stored, so that a resumed search has the same costs."""
    storage, space = run.storage, run.space
    rows = storage.lines(LATENCIES)
    table = LatencyTable(run.device, rows, lambda row: storage.add(LATENCIES, [row]), target=target)
    if table.scale is None and not target.table:
        say(
            f"latency: measured on {target.runtime} with {table.threads} thread{'s' * (table.threads != 1)}, batch "
            f"{target.batch} ({table.device.type}). Another: --budget latency=5ms@onnxruntime,threads=4,batch=1"
        )
        table.calibrate([space.blueprint(a) for a in calibration_networks(space)])
    return table


def _traced(searcher: Searcher, storage: RunFolder, phase: str, total: int) -> Callable[[Sequence[Entry]], None] | None:
    """A callback that writes the searcher's trace into the run's metrics; None where it has no trace."""
    if not searcher.trace():
        return None
    metrics, scored = storage.metrics(phase), set[Architecture]()

    def write(entries: Sequence[Entry]) -> None:
        scored.update(entry.architecture for entry in entries)
        metrics.write(step=len(scored), total=total, trace=searcher.trace())

    return write


def closing_lines(storage: RunFolder) -> list[str]:
    """Why the last search stopped, and the sentences of its controls."""
    record = storage.require("search", "kdnas search")
    recorded = storage.results()["controls"]
    sentences = [recorded[name]["sentence"] for name in (*controls.TAUS, *controls.SEARCH_CONTROLS) if name in recorded]
    return [f"stopped because {record['stopped']}; {record['saved']}", *sentences]
