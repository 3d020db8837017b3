"""Exact search for scores that add up over blocks: the best networks, and the whole front of score against cost."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from kdnas.architecture import Architecture, Value
from kdnas.costs.budget import Cost
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.randomness import python_rng
from kdnas.space import SearchSpace
from kdnas.statistics import pareto_front

_MOST_AT_ONCE = 2_000_000  # states made before the dominated ones are dropped: bounds memory to a few hundred MB
_BEAM = 2_000  # states per block of the inexact first pass, which only has to find a good lower bound


@final
@dataclass(frozen=True)
class BlockTable:
    """What one block of a network may be: a table with one row per option.

    Attributes:
        name: such as `stage1`.
        options: what is chosen, any value; the order decides ties.
        scores: a finite score per option, higher is better.
        costs: name to a finite cost per option, such as `macs`. Every block has the same names.
    """

    name: str
    options: tuple[Any, ...]
    scores: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        columns = {"scores": self.scores, **self.costs}
        if not self.options:
            raise ValueError(f"{self.name} has no options. Give it at least one.")
        for name, column in columns.items():
            if len(column) != len(self.options):
                raise ValueError(
                    f"{self.name} has {len(self.options)} options but {len(column)} {name}. Give one number per option."
                )
            bad = [i for i, value in enumerate(column) if not math.isfinite(value)]
            if bad:
                raise ValueError(
                    f"{name} of {self.name} must be finite, got {column[bad[0]]} for option {self.options[bad[0]]!r}. "
                    "Leave that option out."
                )


@final
@dataclass(frozen=True)
class Combination:
    """One network: an option per block.

    Attributes:
        options: in the order of the blocks.
        score: the sum of the blocks' scores, added from the first block to the last.
        costs: name to the sum of the blocks' costs.
    """

    options: tuple[Any, ...]
    score: float
    costs: dict[str, float]

    @property
    def architecture(self) -> Architecture:
        """The union of the options, where each is a part of an architecture, as `blocks_of` makes them."""
        return Architecture({name: value for part in self.options for name, value in part.items()})


def best(blocks: Sequence[BlockTable], bounds: Mapping[str, float] | None = None, num: int = 1) -> list[Combination]:
    """The `num` best networks within the bounds, best first; fewer where fewer are within them.

    The score of a network is the sum of its blocks' scores, and so is every cost. Block after block, of the partial
    networks only those are kept that fewer than `num` others beat or equal in the score and in every bounded cost
    (for `num` = 1: the Pareto set), that can still become admissible, and that can still become as good as networks
    already known, by the Lagrangian bound of the blocks to come. None of these removes one of the answers, and no cost
    is rounded. Of networks with equal scores, the cheaper comes first (in the order of `bounds`), then the one
    with earlier options.

    Args:
        blocks: in order.
        bounds: cost name to its largest admissible sum, itself admissible; `Budget.bounds()` is one.
        num: how many.

    Raises:
        Infeasible: no network is within the bounds; the nearest is named.
        ValueError: no blocks, unequal cost names, an unknown or undefined bound, or `num` below 1.

    Reference: multiple-choice knapsack by dynamic programming over undominated states: Nemhauser and Ullmann,
        Discrete Dynamic Programming and Capital Allocation, Management Science 1969; the task: Li et al., Block-wisely
        Supervised Neural Architecture Search with Knowledge Distillation, CVPR 2020, section 3.4.
    Differs: the traversal released with the latter keeps a shrinking bound across prefixes and misses optima; this
        equals enumeration. Scores are floating point numbers added from left to right, as enumeration would; two
        sums that differ by rounding alone are different scores.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    bounds = _checked(blocks, bounds or {})
    task = _Task(blocks, tuple(bounds), bounds, num)
    duals = task.duals()
    # A beam finds good networks, and the exact pass drops whatever cannot reach the worst of them.
    beam = task.run(duals, -math.inf, beam=_BEAM)
    floor = sorted(beam.score, reverse=True)[num - 1] if len(beam.score) >= num else -math.inf
    states = task.run(duals, floor)
    if not len(states.score):
        raise _infeasible(blocks, bounds)
    order = np.lexsort((np.arange(len(states.score)), *states.cost.T[::-1], -states.score))[:num]
    return [task.combination(states, int(i)) for i in order]


def front(
    blocks: Sequence[BlockTable], bounds: Mapping[str, float] | None = None, costs: Sequence[str] = ("macs",)
) -> list[Combination]:
    """Every network that none beats: the whole Pareto front of score and `costs` within the bounds, cheapest first.

    Of networks equal in the score and in all `costs`, one is given: the cheaper in the other bounded costs, then the
    one with earlier options.

    Args:
        blocks: in order.
        bounds: as in `best`; on any cost, whether on the front's axes or not.
        costs: the axes beside the score, ascending in the first. With two of them fronts are surfaces, which may have
            hundreds of thousands of networks.

    Raises:
        Infeasible: no network is within the bounds; the nearest is named.
        ValueError: as in `best`, or `costs` empty or unknown.
    """
    bounds = _checked(blocks, bounds or {})
    known = tuple(blocks[0].costs)
    wrong = [name for name in costs if name not in known]
    if wrong or not costs:
        raise ValueError(f"costs must name some of {', '.join(known)}, got {tuple(costs)}.")
    names = (*costs, *(name for name in bounds if name not in costs))
    task = _Task(blocks, names, bounds, 1)
    states = task.run(None, -math.inf)
    if not len(states.score):
        raise _infeasible(blocks, bounds)
    # Those equal on the axes were kept for a bounded cost off them; the cheapest there must come first to stay.
    order = np.lexsort((np.arange(len(states.score)), *states.cost.T[::-1], -states.score))
    axes = np.column_stack([states.cost[:, : len(costs)], -states.score])
    kept = order[pareto_front(axes[order], distinct=True)]
    kept = kept[np.lexsort((states.score[kept], *states.cost[kept][:, : len(costs)].T[::-1]))]
    return [task.combination(states, int(i)) for i in kept]


def blocks_of(
    space: SearchSpace,
    rate: Callable[[str, Architecture], float],
    groups: Mapping[str, Sequence[str]] | None = None,
    num_checks: int = 20,
) -> list[BlockTable]:
    """Tables with exact params and macs for a space whose blocks cost the same whatever the other blocks are.

    A first block, `fixed`, has one option, no score, and the cost of the smallest network; every other option has the
    difference it makes to that. Where a network has several spellings, its canonical one is the option.

    Args:
        space: the search space.
        rate: block name and the architecture's part in that block to a score, higher is better.
        groups: block name to its choices' names; by default the choices are grouped by what stands before their
            first dot, which is the stage in most spaces.
        num_checks: random architectures whose exact cost must equal the sum of their blocks'.

    Raises:
        ValueError: the groups are no partition of the choices, or costs do not add up over them: then a layer of one
            block takes its input from a width that another decides. Merge such blocks.
    """
    if groups is None:
        made: dict[str, list[str]] = {}
        for choice in space.choices:
            made.setdefault(choice.name.partition(".")[0], []).append(choice.name)
        groups = made
    listed = sorted(name for names in groups.values() for name in names)
    if listed != sorted(choice.name for choice in space.choices):
        raise ValueError(f"groups must hold every choice of {space.name or 'the space'} once, got {listed}.")
    base = space.smallest
    fixed = cost(space.blueprint(base))
    blocks = [BlockTable("fixed", (Architecture({}),), (0.0,), {n: (getattr(fixed, n),) for n in Cost._fields})]
    differences: dict[Architecture, Cost] = {}
    for group, names in groups.items():
        parts = list(dict.fromkeys(_parts(space, base, names)))
        found = []
        for part in parts:
            c = cost(space.blueprint(_replaced(base, names, part)))
            found.append(Cost(c.params - fixed.params, c.macs - fixed.macs))
        differences |= dict(zip(parts, found, strict=True))
        costs = {name: tuple(getattr(c, name) for c in found) for name in Cost._fields}
        blocks.append(BlockTable(group, tuple(parts), tuple(float(rate(group, part)) for part in parts), costs))
    rng = python_rng("additive", space.name)
    for _ in range(num_checks):
        architecture = space.sample(rng)
        exact = cost(space.blueprint(architecture))
        used = [differences.get(_part(architecture, names)) for names in groups.values()]
        held = [c for c in used if c is not None]
        added = Cost(fixed.params + sum(c.params for c in held), fixed.macs + sum(c.macs for c in held))
        if len(held) < len(used) or added != exact:
            raise ValueError(
                f"costs of {space.name or 'this space'} do not add up over {', '.join(groups)}: "
                f"{space.code(architecture)} has {exact}, its blocks have {added}. Merge blocks that depend on each "
                "other: groups={...}."
            )
    return blocks


def _part(architecture: Mapping[str, Value], names: Sequence[str]) -> Architecture:
    return Architecture({name: architecture[name] for name in names if name in architecture})


def _replaced(base: Architecture, names: Sequence[str], part: Mapping[str, Value]) -> Architecture:
    return Architecture({**{n: v for n, v in base.items() if n not in names}, **part})


def _parts(space: SearchSpace, base: Architecture, names: Sequence[str]) -> Iterator[Architecture]:
    """Every assignment of the choices named, in canonical spelling."""
    choices = [choice for choice in space.choices if choice.name in names]

    def extend(chosen: dict[str, Value], left: Sequence[Any]) -> Iterator[dict[str, Value]]:
        if not left:
            yield chosen
        elif not left[0].exists({**base, **chosen}):
            yield from extend(chosen, left[1:])
        else:
            for option in left[0].options:
                yield from extend({**chosen, left[0].name: option}, left[1:])

    for values in extend({}, choices):
        yield _part(space.canonical(_replaced(base, names, values)), names)


def _checked(blocks: Sequence[BlockTable], bounds: Mapping[str, float]) -> dict[str, float]:
    if not blocks:
        raise ValueError("there are no blocks. Give at least one.")
    known = set(blocks[0].costs)
    for block in blocks:
        if set(block.costs) != known:
            raise ValueError(f"every block needs the costs {sorted(known)}, {block.name} has {sorted(block.costs)}.")
    for name, bound in bounds.items():
        if name not in known:
            raise ValueError(f"a bound must be on one of {', '.join(sorted(known))}, got {name!r}.")
        if math.isnan(bound) or bound == -math.inf:
            raise ValueError(f"the bound of {name} must be a number, got {bound}.")
    return {name: bound for name, bound in bounds.items() if bound < math.inf}


def _infeasible(blocks: Sequence[BlockTable], bounds: Mapping[str, float]) -> Infeasible:
    """The error that names the network with the least largest overshoot."""
    plain = [BlockTable(b.name, b.options, (0.0,) * len(b.options), b.costs) for b in blocks]
    task = _Task(plain, tuple(bounds), {}, 1)
    states = task.run(None, -math.inf)
    limits = np.array(list(bounds.values()))
    excess = (states.cost - limits) / np.maximum(np.abs(limits), 1.0)
    nearest = task.combination(states, int(excess.max(1).argmin()))
    asked = ", ".join(f"{name} <= {bound:,.6g}" for name, bound in bounds.items())
    has = ", ".join(f"{name} {value:,.6g}" for name, value in nearest.costs.items())
    options = zip(blocks, nearest.options, strict=True)
    chosen = ", ".join(f"{b.name}: {dict(o) if isinstance(o, Mapping) else o}" for b, o in options)
    return Infeasible(f"infeasible: no network has {asked}; the nearest has {has} ({chosen}). Raise the budget.")


@final
@dataclass(frozen=True)
class _States:
    """Partial networks, ordered by their options; the last level's score and cost, and every level's choice."""

    score: NDArray[np.float64]
    cost: NDArray[np.float64]
    parents: list[NDArray[np.int64]]
    chosen: list[NDArray[np.int64]]


class _Task:
    def __init__(
        self, blocks: Sequence[BlockTable], names: tuple[str, ...], bounds: Mapping[str, float], num: int
    ) -> None:
        self.blocks, self.names, self.num = blocks, names, num
        self.limits = np.array([bounds.get(name, math.inf) for name in names])
        self.tables: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]] = []
        for block in blocks:
            # Costs are whole numbers below 2^53 in practice, so that sums in float64 are exact.
            scores = np.array(block.scores, float)
            costs = np.array([block.costs[name] for name in names], float).reshape(len(names), len(scores)).T
            kept = _kept(scores, costs, num)
            self.tables.append((scores[kept], costs[kept], kept))
        # The least that the blocks after each one add to every cost.
        least = np.array([costs.min(0) if len(names) else np.zeros(0) for _, costs, _ in self.tables])
        self.least_after = np.vstack([np.cumsum(least[::-1], 0)[::-1][1:], np.zeros((1, len(names)))])

    def duals(self) -> NDArray[np.float64] | None:
        """Prices per cost, `[prices, costs]`: each gives an upper bound on what the blocks to come can add.

        The score of any admissible completion is at most `sum_blocks max_option (score - price * cost) + price *
        room`, for every price that is not negative; the price that makes this least is found by subgradient steps.
        """
        if not self.names:
            return None
        spread = np.array([max(np.ptp(costs[:, j]) for _, costs, _ in self.tables) for j in range(len(self.names))])
        spread = np.where(spread > 0, spread, 1.0)
        scale = max(float(np.ptp(scores)) for scores, _, _ in self.tables)
        price, seen, bound = np.zeros(len(self.names)), [], math.inf
        for step in range(100):
            total, used = 0.0, np.zeros(len(self.names))
            for scores, costs, _ in self.tables:
                reduced = scores - costs @ price
                at = int(reduced.argmax())
                total, used = total + reduced[at], used + costs[at]
            slope = self.limits - used
            value = total + float(price @ self.limits)
            if value < bound:
                bound = value
                seen.append(price)
            # In units of each cost's spread; the step shrinks, as subgradient steps must.
            slope = slope / spread
            price = np.maximum(0.0, price - scale / (1 + 0.15 * step) * slope / (np.abs(slope).max() or 1.0) / spread)
        return np.array(seen[-6:])

    def run(self, duals: NDArray[np.float64] | None, floor: float, beam: int | None = None) -> _States:
        """All blocks; with a `floor`, states whose bound is below it are dropped."""
        score, cost_ = np.zeros(1), np.zeros((1, len(self.names)))
        parents, chosen = [], []
        after = self._after(duals)
        for level, (scores, costs, options) in enumerate(self.tables):
            held: list[tuple[Any, ...]] = []
            size = max(1, _MOST_AT_ONCE // len(scores))
            for start in range(0, len(score), size):
                made_score = (score[start : start + size, None] + scores).ravel()
                made_cost = (cost_[start : start + size, None] + costs).reshape(len(made_score), len(self.names))
                index = np.arange(start * len(scores), start * len(scores) + len(made_score))
                room = self.limits - made_cost - self.least_after[level]
                fits = np.flatnonzero((room >= 0).all(1))
                held.append((made_score[fits], made_cost[fits], index[fits]))
                if len(held) > 1 and sum(len(h[0]) for h in held) > _MOST_AT_ONCE:
                    held = [self._pruned(self._joined(held), level, duals, after, floor, beam)]
            new = self._pruned(self._joined(held), level, duals, after, floor, beam)
            score, cost_, index = new
            parents.append(index // len(scores))
            chosen.append(options[index % len(scores)])
        return _States(score, cost_, parents, chosen)

    def _joined(self, held: Sequence[tuple[Any, ...]]) -> tuple[Any, Any, Any]:
        none = (np.zeros(0), np.zeros((0, len(self.names))), np.zeros(0, int))
        score, cost_, index = (np.concatenate(columns) for columns in zip(none, *held, strict=True))
        return score, cost_, index

    def _after(self, duals: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """`[levels, prices]`: the most that later blocks add to the score less the price of what they use."""
        if duals is None:
            most = np.array([[scores.max()] for scores, _, _ in self.tables])
        else:
            most = np.array([(scores[:, None] - costs @ duals.T).max(0) for scores, costs, _ in self.tables])
        return np.vstack([np.cumsum(most[::-1], 0)[::-1][1:], np.zeros((1, most.shape[1]))])

    def _pruned(
        self,
        states: tuple[Any, Any, Any],
        level: int,
        duals: NDArray[np.float64] | None,
        after: NDArray[np.float64],
        floor: float,
        beam: int | None,
    ) -> tuple[Any, Any, Any]:
        score, cost_, index = states
        if floor > -math.inf or beam is not None:
            reach = score + after[level].min()
            if duals is not None:
                reach = (score[:, None] + after[level] + (self.limits - cost_) @ duals.T).min(1)
            if floor > -math.inf:
                # The bound is another order of the same sums; its rounding must not drop what is as good as the floor.
                slack = 1e-9 * (1 + abs(floor) + np.abs(score).max(initial=0.0) + np.abs(after[level]).max())
                if duals is not None:
                    slack += 1e-9 * float(np.abs(duals @ self.limits).max())
                kept = np.flatnonzero(reach >= floor - slack)
                score, cost_, index, reach = score[kept], cost_[kept], index[kept], reach[kept]
            if beam is not None and len(score) > beam:
                kept = np.sort(np.argpartition(-reach, beam)[:beam])
                score, cost_, index = score[kept], cost_[kept], index[kept]
        kept = np.sort(_kept(score, cost_, self.num))
        return score[kept], cost_[kept], index[kept]

    def combination(self, states: _States, index: int) -> Combination:
        """The network of a final state."""
        picked, at = [], index
        for parents, chosen in zip(reversed(states.parents), reversed(states.chosen), strict=True):
            picked.append(int(chosen[at]))
            at = int(parents[at])
        picked.reverse()
        costs = {n: sum(b.costs[n][i] for b, i in zip(self.blocks, picked, strict=True)) for n in self.blocks[0].costs}
        options = tuple(b.options[i] for b, i in zip(self.blocks, picked, strict=True))
        return Combination(options, float(states.score[index]), costs)


def _kept(score: NDArray[np.float64], cost_: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """A superset of those with fewer than `num` others before them: `num` fronts, peeled one after the other."""
    left = np.arange(len(score))
    if cost_.shape[1] == 0:
        return np.sort(np.lexsort((left, -score))[:num])
    values = np.column_stack([cost_, -score])
    fronts = []
    for _ in itertools.repeat(None, num):
        if not len(left):
            break
        chosen = np.zeros(len(left), bool)
        chosen[pareto_front(values[left], distinct=True)] = True
        fronts.append(left[chosen])
        left = left[~chosen]
    return np.sort(np.concatenate(fronts)) if fronts else left
