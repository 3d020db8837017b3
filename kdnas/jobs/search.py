"""Ranking: search within a budget, and the random search that costs as much."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kdnas.architecture import Architecture
from kdnas.costs.budget import amount
from kdnas.costs.check import BudgetCheck, check_feasible
from kdnas.costs.latency import LatencyTable
from kdnas.jobs._block_rating import best_networks
from kdnas.jobs._run import Run
from kdnas.network import Network
from kdnas.randomness import python_rng
from kdnas.ranking.early_stopping import EarlyStopping
from kdnas.ranking.loop import Limits
from kdnas.ranking.loop import search as run_search
from kdnas.ranking.order import ranked
from kdnas.runs.entry import CONTRAST, RANDOM, Entry
from kdnas.runs.folder import LATENCIES, RunFolder
from kdnas.runs.progress import progress
from kdnas.scorers.base import Evidence, Saved, Score, Scorer, score_all
from kdnas.scorers.blocks import Blocks
from kdnas.scorers.depth import Depth
from kdnas.scorers.nwot import Nwot
from kdnas.scorers.synflow import Synflow
from kdnas.scorers.zen import Zen
from kdnas.searchers.base import Searcher
from kdnas.searchers.random_search import RandomSearch
from kdnas.settings import Search
from kdnas.space import SearchSpace
from kdnas.specs import Spec, spec
from kdnas.statistics import interval, kendall, resampled_kendall, resampled_max
from kdnas.tables import unstructure

FLUSH_SECONDS = 1.0  # between writings of scores, so that a kill costs little
# Enough for an interval of about +-0.2, and little beside the search itself.
_TRAINING_FREE_ENTRIES = 50
_TRAINING_FREE_SECONDS = 4.0
_BOTH = 10
_REMEASURED = 5
_CONTROLS = ("stopping", "random search", "contrast", "latency")


def search(run: Run, settings: Search) -> list[Entry]:
    """Rank subnets of a trained run; appends to its ranking and returns this search's entries, best first.

    An interrupted search with the same settings goes on: its scores are replayed to the searcher. Beside it a random
    search with as many evaluations and as much time is run, unless `settings.control` is off. An exact search ranks
    the best networks only, so its controls that relate scores to sizes are measured on the random ones.

    With a pruner evaluations may be stopped early. The random search then has none, and as many whole evaluations as
    all of the search's cost together; agreements with sizes are measured on whole evaluations.

    Raises:
        Infeasible: no network is within the budget; the nearest is named.
        Uninformative: the score does not tell candidates apart.
        ValueError: the run has no trained supernet; for an exact search, none trained block-wise.
    """
    storage, space = run.storage, run.space
    if settings.exact:
        settings = dataclasses.replace(settings, scorer=spec(Blocks))
    supernet = run.supernet
    meter = BudgetCheck(space, settings.budget, partial(_latencies, run))
    check_feasible(meter, python_rng(settings.seed, "feasible"))
    evidence = run.evidence(settings.num_images, settings.seed)
    scorer = run.scorer(settings.scorer)
    if settings.pruner is not None:
        EarlyStopping(settings.pruner, scorer)  # what is wrong with it is said before anything is written
    plain = unstructure(settings)
    searches: list[dict[str, Any]] = storage.manifest["searches"]
    if not (searches and searches[-1]["settings"] == plain and searches[-1]["state"] == "running"):
        searches.append({"settings": plain, "state": "running"})
        storage.save()
    number = len(searches)
    if settings.initial and number == 1:
        raise ValueError("this is the run's first search, so there is no earlier one to begin from. Set initial to 0.")
    storage.forget_controls(lambda name: name.startswith("tau ") or name in _CONTROLS)
    began = time.perf_counter()
    saved = Saved()

    def best_before(purpose: str) -> list[Architecture]:
        earlier = [e for e in storage.ranking(number - 1) if e.searcher != RANDOM and meter.admits(e.architecture)]
        alike = [e for e in earlier if (e.searcher == CONTRAST) == (purpose == CONTRAST)]
        return [e.architecture for e in ranked(alike or earlier)][: settings.initial]

    def one(made: Spec, purpose: str, seconds: float, evaluations: int) -> tuple[list[Entry], str]:
        # The contrast draws as the search does: what differs is the score alone.
        drawn = python_rng(settings.seed, "control" if purpose == RANDOM else "search")
        searcher = made.build(Searcher, space=space, admits=meter.admits, rng=drawn)
        judge = run.scorer(settings.contrast) if settings.contrast and purpose == CONTRAST else scorer
        named = settings.contrast if settings.contrast and purpose == CONTRAST else settings.scorer
        labels = (named.name, made.name if purpose == "search" else purpose, number)
        written = [e for e in storage.ranking(number) if e.searcher == labels[1]]
        alike = [e for e in storage.ranking(number) if (e.searcher == CONTRAST) == (purpose == CONTRAST)]
        stopping = EarlyStopping(settings.pruner, judge) if settings.pruner and purpose != RANDOM else None
        if settings.pruner is not None:  # what a pruner said holds for its own search, in its order
            alike = [e for e in alike if e.searcher == labels[1] or (purpose == RANDOM and e.share == 1)]
        known = {e.architecture: Score(e.score, e.parts, e.share) for e in alike}
        first = best_before(purpose) if settings.initial and purpose != RANDOM else []
        _trace(searcher, storage, f"{purpose} {number}", evaluations)
        have = {e.architecture: e for e in written}
        entries: list[Entry] = []
        waiting: list[Entry] = []
        why = ""
        flushed = time.perf_counter()
        limits = Limits(evaluations, seconds)
        asking = {"known": known, "labels": labels, "saved": saved, "stopping": stopping, "first": first}
        with progress(purpose, evaluations) as bar:
            for found in run_search(supernet, judge, searcher, evidence, limits, **asking):
                if isinstance(found, str):
                    why = found
                    continue
                found = dataclasses.replace(found, spent=meter.measured(found.architecture))
                entries.append(have.get(found.architecture, found))
                if found.architecture not in have:
                    waiting.append(found)
                if time.perf_counter() - flushed > FLUSH_SECONDS or len(waiting) >= 100:
                    storage.append(waiting)
                    waiting, flushed = [], time.perf_counter()
                bar.update(len(entries), f"best {max(e.score for e in entries):.4f}")
        storage.append(waiting)
        return entries, why

    def exactly() -> tuple[list[Entry], str]:
        found, instead = best_networks(run, settings, evidence, number)
        have = {e.architecture: e for e in storage.ranking(number) if e.searcher == "exact"}
        storage.append([e for e in found if e.architecture not in have])
        stopped = f"every path of every block was rated, {instead}, and the search over their sums is exact"
        return [have.get(e.architecture, e) for e in found], stopped

    count = settings.num_evaluations
    share = settings.max_time / (1 + settings.control + (settings.contrast is not None))
    entries, stopped = exactly() if settings.exact else one(settings.searcher, "search", share, count)
    if not entries:
        raise ValueError(
            f"the search found no network with {settings.budget} ({stopped}). Raise the budget or --max-time, or use "
            "another searcher."
        )
    spent = time.perf_counter() - began
    left = settings.max_time - spent
    random_entries: list[Entry] = []
    control: dict[str, dict[str, Any]] = {}
    paid = count if settings.pruner is None else max(1, math.ceil(sum(e.share for e in entries) - 1e-9))
    if settings.pruner is not None:
        control["stopping"] = _stopped(entries)
    if settings.control and left > 0:
        random_entries, _ = one(spec(RandomSearch), RANDOM, min(left, max(spent, 1.0)), paid)
        control["random search"] = _random_control(entries, random_entries)
    elif settings.control:
        control["random search"] = {"sentence": "Random search at equal cost is left out: the time is over."}
    left = settings.max_time - (time.perf_counter() - began)
    if settings.contrast is not None and left > 0:
        try:
            others, _ = one(settings.searcher, CONTRAST, min(left, max(spent, 1.0)), count)
            until = began + settings.max_time
            control["contrast"] = _contrast(run, settings.contrast, scorer, evidence, entries, others, until)
        except ValueError as error:  # the search itself has ended well
            control["contrast"] = {"sentence": f"The contrast is left out: {error}"}
    elif settings.contrast is not None:
        control["contrast"] = {"sentence": "The contrast is left out: the time is over."}
    whole = [e for e in entries if e.share == 1] or entries
    seen = random_entries if settings.exact and len(random_entries) > 1 else whole
    left = min(settings.max_time - (time.perf_counter() - began), _TRAINING_FREE_SECONDS)
    controls = _controls(seen) | training_free(run, evidence, seen, left) | control
    if meter.table is not None:
        controls["latency"] = _remeasured(
            meter.table, space, settings.budget.latency or math.inf, ranked(entries)[:_REMEASURED]
        )
    storage.record_controls(controls)
    searches[-1]["state"] = "done"
    storage.finish(
        "search",
        seconds=round((storage.phase("search") or {}).get("seconds", 0.0) + time.perf_counter() - began, 3),
        evaluations=len(entries),
        stopped=stopped,
        saved=str(saved),
        budget=settings.budget.bounds(),
        search=number,
    )
    return ranked(entries)


def _latencies(run: Run) -> LatencyTable:
    """The run's latency table, on the run's device; its rows are kept, so that a resumed search decides alike."""
    storage, space = run.storage, run.space
    table = LatencyTable(run.device, storage.lines(LATENCIES), lambda row: storage.add(LATENCIES, [row]))
    rng = python_rng(0, "latency")
    drawn = (space.smallest, space.largest, *(space.sample(rng) for _ in range(3)))
    table.calibrate([space.blueprint(a) for a in drawn])
    return table


def _remeasured(table: LatencyTable, space: SearchSpace, bound: float, entries: list[Entry]) -> dict[str, Any]:
    """The first places measured whole: a table is a prediction."""
    whole = [table.whole(space.blueprint(e.architecture)) for e in entries]
    ratios = [w / e.spent["latency"] for w, e in zip(whole, entries, strict=True)]
    worst = max(ratios, key=lambda r: abs(r - 1))
    said = ", ".join(f"{1e3 * w:.3g}" for w in whole)
    sentence = (
        f"Latency of places 1 to {len(entries)} measured whole: {said} ms, for {amount('latency', bound)} "
        f"allowed; the table of layers is off by at most {abs(worst - 1):.0%}."
    )
    over = [i for i, w in enumerate(whole, 1) if w > bound]
    if over:
        sentence += f" Over the bound as measured: place {', '.join(map(str, over))}."
    if abs(drift := table.drift()) > 0.1:
        sentence += f" The machine runs {drift:+.0%} slower than when the table was begun: take the seconds with care."
    return {"value": worst - 1, "seconds": whole, "sentence": sentence}


def _trace(searcher: Searcher, storage: RunFolder, phase: str, total: int) -> None:
    """Write what the searcher traces into the run's metrics, after everything it is told."""
    if not searcher.trace():
        return
    metrics, tell, told = storage.metrics(phase), searcher.tell, set[Architecture]()

    def tell_and_write(scored: Sequence[Entry]) -> None:
        tell(scored)
        told.update(entry.architecture for entry in scored)
        metrics.write(step=len(told), total=total, trace=searcher.trace())

    searcher.tell = tell_and_write  # type: ignore[method-assign]


def _stopped(entries: list[Entry]) -> dict[str, Any]:
    """How many evaluations were stopped early, and what all of them cost."""
    early, paid = sum(e.share < 1 for e in entries), sum(e.share for e in entries)
    sentence = f"{early} of {len(entries)} evaluations were stopped early; all of them cost {paid:.1f} whole ones."
    return {"value": paid, "stopped": early, "sentence": sentence}


def _contrast(
    run: Run,
    contrast: Spec,
    scorer: Scorer,
    evidence: Evidence,
    entries: list[Entry],
    others: list[Entry],
    until: float,
) -> dict[str, Any]:
    """How the search and the same search under another score differ.

    The ten best of each are scored by both, as far as the time goes, best first.
    """
    if not others:
        return {"sentence": "The contrast found no network within the budget and the time."}
    own, other = ({e.architecture: e.score for e in held if e.share == 1} for held in (entries, others))
    judge = run.scorer(contrast)
    for known, missing, by in ((own, other, judge), (other, own, scorer)):
        for architecture in sorted(known, key=lambda a: -known[a])[:_BOTH]:
            if architecture not in missing and time.perf_counter() < until:
                missing[architecture] = score_all(run.supernet, [architecture], by, evidence)[0].value
    both = [a for a in own if a in other]
    if len(both) < 3:
        return {"sentence": f"The two scores are not compared: the time was over with {len(both)} networks in common."}
    value = kendall([own[a] for a in both], [other[a] for a in both])
    low, high = interval(resampled_kendall, [own[a] for a in both], [other[a] for a in both], resamples=200)
    first, second = ranked(entries)[0], ranked(others)[0]
    choices = {c.name for c in run.space.choices}
    differing = sorted(n for n in choices if first.architecture.get(n) != second.architecture.get(n))
    sentence = (
        f"The same search under {contrast}: Kendall's tau between the two scores of {len(both)} networks is "
        f"{value:.2f} [{low:.2f}, {high:.2f}]; it finds {second.code} ({second.macs:,} MACs), the search itself "
        f"{first.code} ({first.macs:,} MACs)"
    )
    sentence += f": other in {len(differing)} of {len(choices)} choices." if differing else ": the same network."
    held = {"value": value, "interval": [low, high], "sentence": sentence, "differing": differing}
    return held | {"networks": len(both), "code": second.code}


def _controls(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    scores = [e.score for e in entries]
    controls: dict[str, dict[str, Any]] = {}
    words = {"params": "parameters", "macs": "multiply-accumulates", "layers": "the number of layers"}
    for name, said in words.items():
        controls[f"tau {name}"] = _agreement(scores, [float(getattr(e, name)) for e in entries], said)
        if controls[f"tau {name}"].get("value", 0.0) > 0.8:
            controls[f"tau {name}"]["sentence"] += " The score says little more than size does."
    return controls


def _agreement(scores: list[float], others: list[float], said: str) -> dict[str, Any]:
    if len(scores) < 3:
        return {"sentence": f"Agreement with {said} is left out: {len(scores)} networks are too few to be ranked."}
    value = kendall(scores, others)
    low, high = interval(resampled_kendall, scores, others, resamples=200)
    sentence = f"Kendall's tau between the score and {said}: {value:.2f} [{low:.2f}, {high:.2f}]."
    return {"value": value, "interval": [low, high], "sentence": sentence}


def training_free(run: Run, evidence: Evidence, entries: list[Entry], seconds: float) -> dict[str, dict[str, Any]]:
    """Kendall's tau with scores of untrained networks, depth, nwot, synflow and zen, on at most 50 of the entries.

    The seconds are shared by the last three; what has fewer than 10 networks by then is left out, and the sentence
    says why.
    """
    drawn = python_rng(evidence.seed, "training-free").sample(entries, min(_TRAINING_FREE_ENTRIES, len(entries)))
    with torch.device("meta"):  # these scorers draw weights of their own
        networks = [Network(run.space.blueprint(e.architecture)) for e in drawn]
    controls: dict[str, dict[str, Any]] = {}
    for name, scorer in (("depth", Depth()), ("nwot", Nwot()), ("synflow", Synflow()), ("zen", Zen())):
        found: list[float] = []
        began = time.perf_counter()
        if seconds <= 0:
            controls[f"tau {name}"] = {"sentence": f"Agreement with {name} is left out: the time is over."}
            continue
        try:
            for network in networks:
                found.append(scorer.score(network, evidence).value)
                if time.perf_counter() - began > seconds / 3:
                    break
        except ValueError as error:
            controls[f"tau {name}"] = {"sentence": f"Agreement with {name} is left out: {error}"}
            continue
        if len(found) < min(10, len(drawn)):
            each = (time.perf_counter() - began) / len(found)
            sentence = f"Agreement with {name} is left out: it takes {each:.1f} s for each network."
            controls[f"tau {name}"] = {"sentence": sentence}
            continue
        controls[f"tau {name}"] = _agreement(
            [e.score for e in drawn[: len(found)]], found, f"{name}, of {len(found)} untrained networks"
        )
    return controls


def _random_control(entries: list[Entry], drawn: list[Entry]) -> dict[str, Any]:
    """The best of random draws, as many as the search evaluated, against the search's best."""
    if not drawn:
        return {"sentence": "Random search at equal cost is left out: it drew no network within the budget."}
    best = max(e.score for e in entries)
    scores = [e.score for e in drawn]
    low, high = interval(resampled_max, scores)
    sentence = f"The search's best score is {best:.4f}, that of {len(drawn)} random subnets {max(scores):.4f}."
    if best <= max(scores):
        sentence += " The search is not distinguishable from random search at this cost."
    return {"value": max(scores), "interval": [low, high], "sentence": sentence}


def ranking_json(storage: RunFolder, entries: list[Entry], top: int) -> str:
    """The first places and the controls as one JSON object."""
    places = [{"place": i, **e.to_json()} for i, e in enumerate(entries[:top], 1)]
    return json.dumps({"places": places, "controls": storage.results()["controls"], "search": storage.phase("search")})


def ranking_table(storage: RunFolder, entries: list[Entry], top: int) -> str:
    """The first places, and under them the controls."""
    width = max(len(e.code) for e in entries[:top])
    more = "".join(f"  {name:>15}" for name in entries[0].spent)
    lines = [f"{'place':>5}  {'code':<{width}}  {'score':>9}  {'params':>11}  {'MACs':>13}  {'layers':>6}{more}"]
    for place, e in enumerate(entries[:top], 1):
        more = "".join(f"  {amount(name, value):>15}" for name, value in e.spent.items())
        lines.append(
            f"{place:>5}  {e.code:<{width}}  {e.score:>9.4f}  {e.params:>11,}  {e.macs:>13,}  {e.layers:>6}{more}"
        )
    record = storage.require("search", "kdnas search")
    lines += ["", f"stopped because {record['stopped']}; {record['saved']}"]
    taus = [f"tau {name}" for name in ("params", "macs", "layers", "depth", "nwot", "synflow", "zen")]
    names = (*taus, *_CONTROLS)
    controls = storage.results()["controls"]
    lines += [controls[name]["sentence"] for name in names if name in controls]
    return "\n".join(lines)
