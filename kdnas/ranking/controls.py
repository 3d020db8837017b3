"""Controls of a search: baselines that its entries are compared with, as values, intervals and sentences."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from kdnas.costs.budget import amount
from kdnas.costs.latency import LatencyTable
from kdnas.network import Network, without_weights
from kdnas.randomness import python_rng
from kdnas.ranking.order import ranked
from kdnas.runs.entry import Entry
from kdnas.scorers.base import Evidence, Scorer, score_all
from kdnas.scorers.depth import Depth
from kdnas.scorers.nwot import Nwot
from kdnas.scorers.synflow import Synflow
from kdnas.scorers.zen import Zen
from kdnas.space import SearchSpace
from kdnas.statistics import interval, kendall, resampled_kendall, resampled_max
from kdnas.supernet import Supernet

SIZES = {"params": "parameters", "macs": "multiply-accumulates", "layers": "the number of layers"}
TRAINING_FREE = ("depth", "nwot", "synflow", "zen")
TAUS = tuple(f"tau {name}" for name in (*SIZES, *TRAINING_FREE))
_ROUNDS = 3
SEARCH_CONTROLS = ("trainings", "stopping", "random search", "contrast", "latency")
"""With `TAUS`, the names of all controls of a search, in the order in which they are printed."""

# Enough for an interval of about +-0.2, and little beside the search itself: about ten seconds on one core. Numbers
# of networks and of multiply-accumulates, not seconds, so that another load on the machine gives the same result.
TRAINING_FREE_ENTRIES = 50
_TRAINING_FREE_MACS = 3e11
_COMPARED = 10


def sizes(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Kendall's tau of the score with params, MACs and the number of layers."""
    scores = [e.score for e in entries]
    controls: dict[str, dict[str, Any]] = {}
    for name, words in SIZES.items():
        control = _agreement(scores, [float(getattr(e, name)) for e in entries], words)
        if control.get("value", 0.0) > 0.8:
            control["sentence"] += " The score says little more than size does."
        controls[f"tau {name}"] = control
    return controls


def _agreement(scores: list[float], others: list[float], words: str) -> dict[str, Any]:
    if len(scores) < 3:
        return {"sentence": f"Agreement with {words} is left out: {len(scores)} networks are too few to be ranked."}
    value, low, high = _tau(scores, others)
    sentence = f"Kendall's tau between the score and {words}: {value:.2f} [{low:.2f}, {high:.2f}]."
    return {"value": value, "interval": [low, high], "sentence": sentence}


def _tau(scores: list[float], others: list[float]) -> tuple[float, float, float]:
    return kendall(scores, others), *interval(resampled_kendall, scores, others, resamples=200)


def training_free(
    entries: Sequence[Entry], space: SearchSpace, evidence: Evidence, seconds: float
) -> dict[str, dict[str, Any]]:
    """Kendall's tau of the score with those of untrained networks, depth, nwot, synflow and zen.

    On 50 entries, or as many as cost 300 G multiply-accumulates on the images; with fewer than 10 of them, or where the
    seconds end, a score is left out, with the reason in the sentence.
    """
    sample = python_rng(evidence.seed, "training-free").sample(entries, min(TRAINING_FREE_ENTRIES, len(entries)))
    spent = itertools.accumulate(len(evidence.images) * e.macs for e in sample)
    affordable = sum(macs <= _TRAINING_FREE_MACS for macs in spent)
    until = time.perf_counter() + seconds
    networks = [without_weights(space.blueprint(e.architecture)) for e in sample]  # these scorers draw weights
    controls: dict[str, dict[str, Any]] = {}
    for name, scorer in zip(TRAINING_FREE, (Depth(), Nwot(), Synflow(), Zen()), strict=True):
        try:
            count = len(sample) if name == "depth" else affordable
            if count < min(10, len(sample)):
                raise ValueError(f"10 networks cost more than {_TRAINING_FREE_MACS / 1e9:g} G multiply-accumulates.")
            scores = _scores_until(until, networks[:count], scorer, evidence)
        except ValueError as error:
            controls[f"tau {name}"] = {"sentence": f"Agreement with {name} is left out: {error}"}
        else:
            words = f"{name}, of {len(scores)} untrained networks"
            controls[f"tau {name}"] = _agreement([e.score for e in sample[: len(scores)]], scores, words)
    return controls


def _scores_until(until: float, networks: Sequence[Network], scorer: Scorer, evidence: Evidence) -> list[float]:
    """The scores.

    Raises:
        ValueError: the time is over before the last, or as the scorer.
    """
    scores: list[float] = []
    for network in networks:
        if time.perf_counter() >= until:
            raise ValueError("the time is over.")
        scores.append(scorer.score(network, evidence).value)
    return scores


def random_search(entries: Sequence[Entry], random_entries: Sequence[Entry], count: int) -> dict[str, Any]:
    """The best score of a random search of at most `count` evaluations against the best of the search."""
    if not random_entries:
        return {"sentence": "Random search at equal cost is left out: it drew no network within the budget."}
    best, scores = max(e.score for e in entries), [e.score for e in random_entries]
    fewer = f" ({count} would cost as much)" if len(scores) < count else ""
    sentence = f"The search's best score is {best:.4f}, that of {len(scores)} random subnets{fewer} {max(scores):.4f}."
    if best <= max(scores):
        sentence += " The search is not distinguishable from random search at this cost."
    return {"value": max(scores), "interval": [*interval(resampled_max, scores)], "sentence": sentence}


def early_stopping(entries: Sequence[Entry]) -> dict[str, Any]:
    """Number of evaluations stopped early, and the cost of all evaluations."""
    early, spent = sum(e.share < 1 for e in entries), sum(e.share for e in entries)
    sentence = f"{early} of {len(entries)} evaluations were stopped early; all of them cost {spent:.1f} whole ones."
    return {"value": spent, "stopped": early, "sentence": sentence}


def contrast(
    entries: Sequence[Entry],
    others: Sequence[Entry],
    scorers: tuple[Scorer, Scorer],
    name: str,
    supernet: Supernet,
    evidence: Evidence,
    seconds: float,
) -> dict[str, Any]:
    """Difference of a search and the same search under another score.

    The ten best of each are scored by both scorers, best first, while there is time.

    Args:
        entries: those of the search.
        others: those of the same search under the other score.
        scorers: the search's and the other.
        name: that of the other scorer.
        supernet: with the weights.
        evidence: common to both.
        seconds: limit on the time of scoring.
    """
    if not others:
        return {"sentence": "The contrast found no network within the budget and the time."}
    until = time.perf_counter() + seconds
    own, other = ({e.architecture: e.score for e in ranking if e.share == 1} for ranking in (entries, others))
    for scores, missing, scorer in ((own, other, scorers[1]), (other, own, scorers[0])):
        for architecture in sorted(scores, key=lambda a: -scores[a])[:_COMPARED]:
            if architecture not in missing and time.perf_counter() < until:
                missing[architecture] = score_all(supernet, [architecture], scorer, evidence)[0].value
    both = [a for a in own if a in other]
    if len(both) < 3:
        return {"sentence": f"The two scores are not compared: the time was over with {len(both)} networks in common."}
    value, low, high = _tau([own[a] for a in both], [other[a] for a in both])
    first, second = ranked(entries)[0], ranked(others)[0]
    choices = {c.name for c in supernet.space.choices}
    differing = sorted(n for n in choices if first.architecture.get(n) != second.architecture.get(n))
    sentence = (
        f"The same search under {name}: Kendall's tau between the two scores of {len(both)} networks is "
        f"{value:.2f} [{low:.2f}, {high:.2f}]; it finds {second.code} ({second.macs:,} MACs), the search itself "
        f"{first.code} ({first.macs:,} MACs)"
    )
    sentence += f": other in {len(differing)} of {len(choices)} choices." if differing else ": the same network."
    control = {"value": value, "interval": [low, high], "sentence": sentence, "differing": differing}
    return control | {"networks": len(both), "code": second.code}


def measured_latency(entries: Sequence[Entry], table: LatencyTable, space: SearchSpace, bound: float) -> dict[str, Any]:
    """Measured latency of the first entries of a ranking, to check the prediction by the table of layers."""
    target, threads = table.target, f"{table.threads} thread{'s' * (table.threads != 1)}"
    words = f"on {target.runtime} with {threads}, batch {target.batch}"
    if target.table:
        return {"sentence": f"Latency {words} is predicted by a table of another device: measure the student there."}
    blueprints = [space.blueprint(e.architecture) for e in entries]
    rounds = [
        [table.whole(blueprint) for blueprint in blueprints] for _ in range(_ROUNDS)
    ]  # in turn: load comes and goes
    seconds = [sorted(values)[_ROUNDS // 2] for values in zip(*rounds, strict=True)]
    spread = max((max(v) - min(v)) / 2 / s for v, s in zip(zip(*rounds, strict=True), seconds, strict=True))
    ratios = [s / e.spent["latency"] for s, e in zip(seconds, entries, strict=True)]
    worst = max(ratios, key=lambda r: abs(r - 1))
    sentence = (
        f"Latency of places 1 to {len(entries)} measured whole {words}: "
        f"{', '.join(f'{1e3 * s:.3g}' for s in seconds)} ms (medians of {_ROUNDS}, spread up to ± {spread:.0%}), for "
        f"{amount('latency', bound)} allowed; the table of layers is off by at most {abs(worst - 1):.0%}."
    )
    over = [place for place, s in enumerate(seconds, 1) if s > bound]
    if over:
        sentence += f" Over the bound as measured: place {', '.join(map(str, over))}."
    if abs(drift := table.drift()) > 0.1:
        sentence += f" The machine runs {drift:+.0%} slower than when the table was begun: take the seconds with care."
    return {"value": worst - 1, "seconds": seconds, "spread": spread, "sentence": sentence}
