"""Searches over a table instead of a network: an additive score on NAS-Bench-Macro's codes, with exact costs."""

import dataclasses
import functools
import random
from collections.abc import Sequence

from kdnas.architecture import Architecture
from kdnas.costs.budget import Budget, Cost
from kdnas.costs.count import cost
from kdnas.runs.entry import Entry
from kdnas.space import SearchSpace
from kdnas.specs import find_spec
from kdnas.tables import load_space

MACRO = load_space("nas_bench_macro")
SMALL = dataclasses.replace(MACRO, depths=(1, 1, 2))
WORTH = random.Random(7)
TABLE = {
    (choice.name, option): (0.0, 1.0, 1.3)[place] + 0.5 * WORTH.random()
    for choice in MACRO.choices
    for place, option in enumerate(choice.options)
}


BASE = cost(MACRO.blueprint(MACRO.smallest))


@functools.cache
def added(name: str, option: str) -> Cost:
    """What one operation costs more than the identity in its place; this space's costs add up (test_exact.py)."""
    c = cost(MACRO.blueprint(Architecture({**MACRO.smallest, name: option})))
    return Cost(c.params - BASE.params, c.macs - BASE.macs)


@functools.cache
def cost_of(architecture: Architecture) -> Cost:
    if len(architecture) < len(MACRO.choices):
        return cost(SMALL.blueprint(architecture))
    parts = [BASE, *(added(name, str(option)) for name, option in architecture.items())]
    return Cost(sum(c.params for c in parts), sum(c.macs for c in parts))


def value(architecture: Architecture) -> float:
    return sum(TABLE[item] for item in architecture.items())


@functools.cache
def entry(architecture: Architecture) -> Entry:
    c = cost_of(architecture)
    code = "".join(str(value)[-1] for value in architecture.values())
    return Entry(architecture, code, value(architecture), {}, c.params, c.macs, 0, 0.0)


def entries_of(architectures: Sequence[Architecture]) -> list[Entry]:
    return [entry(a) for a in architectures]


def beats(one: Entry, other: Entry) -> bool:
    a, b = ((-e.score, e.params, e.macs) for e in (one, other))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def searched(
    name: str, seed: int, evaluations: int, budget: Budget = Budget(), space: SearchSpace = MACRO, **arguments: object
) -> tuple[list[Entry], str]:
    """Unique networks in the order they were asked, and why it ended; the loop of `kdnas.ranking.loop` on a table."""
    searcher = find_spec("kdnas.searchers", name, **arguments).build(
        object, space=space, admits=lambda a: budget.admits(cost_of(a)), rng=random.Random(seed)
    )
    found: dict[Architecture, Entry] = {}
    while len(found) < evaluations:
        asked = searcher.ask(evaluations - len(found))
        if not asked:
            return list(found.values()), searcher.stopped
        told = entries_of(asked)
        found |= {e.architecture: e for e in told}
        searcher.tell(told)
    return list(found.values()), "enough"
