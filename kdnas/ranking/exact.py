"""Exact search for scores that are sums over blocks: the best networks, and the Pareto front of score and costs."""

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

_MOST_AT_ONCE = 2_000_000  # states created before dominated ones are dropped: bounds memory to a few hundred MB
_BEAM = 2_000  # states per block of the inexact first pass, which only needs a good lower bound


@final
@dataclass(frozen=True)
class BlockTable:
    """The options of one block of a network: a table with one row per option.

    Attributes:
        name: such as `stage1`.
        options: any values; their order decides ties.
        scores: a finite score per option, higher is better.
        costs: name, such as `macs`, to a finite cost per option. All blocks have the same names.
    """

    name: str
    options: tuple[Any, ...]
    scores: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        columns = {"scores": self.scores, **self.costs}
        if not self.options:
            raise ValueError(f"block {self.name!r} must have at least one option.")
        for name, column in columns.items():
            if len(column) != len(self.options):
                raise ValueError(
                    f"block {self.name!r} must have one number per option, got {len(column)} {name} for "
                    f"{len(self.options)} options."
                )
            bad = [i for i, value in enumerate(column) if not math.isfinite(value)]
            if bad:
                raise ValueError(
                    f"{name} of block {self.name!r} must be finite, got {column[bad[0]]} for option "
                    f"{self.options[bad[0]]!r}. Remove the option."
                )


@final
@dataclass(frozen=True)
class Combination:
    """One network: an option per block.

    Attributes:
        options: in the order of the blocks.
        score: the sum of the blocks' scores, from the first block to the last.
        costs: name to the sum of the blocks' costs.
    """

    options: tuple[Any, ...]
    score: float
    costs: dict[str, float]

    @property
    def architecture(self) -> Architecture:
        """The union of the options, for options that are parts of an architecture, as those of `blocks_of`."""
        return Architecture({name: value for part in self.options for name, value in part.items()})


def best(blocks: Sequence[BlockTable], bounds: Mapping[str, float] | None = None, num: int = 1) -> list[Combination]:
    """The `num` best networks within the bounds, best first; fewer where fewer are within them.

    The score of a network is the sum of its blocks' scores, and so is every cost. Block after block, a partial network
    is dropped when at least `num` others are no worse in the score and in every bounded cost (for `num` = 1: outside
    the Pareto set), when none of its completions is admissible, or when by the Lagrangian bound of the remaining blocks
    none can become as good as networks already known. This removes no solution, and costs are not rounded. Of networks
    with equal scores the cheaper comes first (in the order of `bounds`), then the one with earlier options.

    Args:
        blocks: in order.
        bounds: cost name to its largest admissible sum, such as `Budget.bounds()`.
        num: number of networks.

    Raises:
        Infeasible: no network is within the bounds; the message has the nearest.
        ValueError: no blocks, unequal cost names, an unknown or undefined bound, or `num` below 1.

    Reference: multiple-choice knapsack by dynamic programming over undominated states: Nemhauser and Ullmann,
        Discrete Dynamic Programming and Capital Allocation, Management Science 1969; the task: Li et al., Block-wisely
        Supervised Neural Architecture Search with Knowledge Distillation, CVPR 2020, section 3.4.
    Differs: the traversal released with the latter keeps a shrinking bound across prefixes and misses optima; this
        equals enumeration. Scores are floating point numbers added from left to right, as enumeration would; two
        sums that differ by rounding alone are different scores.
    """
    if num < 1:
        raise ValueError(f"`num` must be at least 1, got {num}.")
    bounds = _finite_bounds(blocks, bounds or {})
    task = _Task(blocks, tuple(bounds), bounds, num)
    duals = task.duals()
    # A beam search finds good networks; the exact pass drops whatever cannot reach the worst of them.
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
    """The Pareto front of score and `costs` within the bounds, cheapest first.

    Of networks equal in the score and in all `costs`, the front has one: the cheaper in the other bounded costs, then
    the one with earlier options.

    Args:
        blocks: in order.
        bounds: as in `best`; on any cost, whether on the front's axes or not.
        costs: the objectives beside the score; networks are ascending in the first. With two of them the front is a
            surface, which may have hundreds of thousands of networks.

    Raises:
        Infeasible: no network is within the bounds; the nearest is named.
        ValueError: as in `best`, or `costs` empty or unknown.
    """
    bounds = _finite_bounds(blocks, bounds or {})
    known = tuple(blocks[0].costs)
    wrong = [name for name in costs if name not in known]
    if wrong or not costs:
        raise ValueError(f"`costs` must be among {', '.join(known)}, got {tuple(costs)}.")
    names = (*costs, *(name for name in bounds if name not in costs))
    task = _Task(blocks, names, bounds, 1)
    states = task.run(None, -math.inf)
    if not len(states.score):
        raise _infeasible(blocks, bounds)
    # States equal on the axes may differ in other bounded costs; the cheapest there comes first and stays.
    order = np.lexsort((np.arange(len(states.score)), *states.cost.T[::-1], -states.score))
    axes = np.column_stack([states.cost[:, : len(costs)], -states.score])
    indices = order[pareto_front(axes[order], distinct=True)]
    indices = indices[np.lexsort((states.score[indices], *states.cost[indices][:, : len(costs)].T[::-1]))]
    return [task.combination(states, int(i)) for i in indices]


def blocks_of(
    space: SearchSpace,
    rate: Callable[[str, Architecture], float],
    groups: Mapping[str, Sequence[str]] | None = None,
    num_checks: int = 20,
) -> list[BlockTable]:
    """Tables with exact params and macs for a space whose costs are sums over blocks.

    A first block, `fixed`, has one option, score 0 and the cost of the smallest network; the costs of other options are
    differences to it. Where a network has several spellings, the option is the canonical one.

    Args:
        space: the search space.
        rate: block name and the architecture's part in that block to a score, higher is better.
        groups: block name to its choices' names; by default choices are grouped by the part of their name before the
            first dot, which is the stage in most spaces.
        num_checks: random architectures whose exact cost must equal the sum of their blocks'.

    Raises:
        ValueError: the groups are no partition of the choices, or costs are not sums over them, because the input width
            of a layer of one block depends on another. Merge such blocks.
    """
    if groups is None:
        by_prefix: dict[str, list[str]] = {}
        for choice in space.choices:
            by_prefix.setdefault(choice.name.partition(".")[0], []).append(choice.name)
        groups = by_prefix
    choice_names = sorted(name for names in groups.values() for name in names)
    if choice_names != sorted(choice.name for choice in space.choices):
        raise ValueError(f"`groups` must have every choice of {space.name or 'the space'} once, got {choice_names}.")
    base = space.smallest
    fixed = cost(space.blueprint(base))
    blocks = [BlockTable("fixed", (Architecture({}),), (0.0,), {n: (getattr(fixed, n),) for n in Cost._fields})]
    differences: dict[Architecture, Cost] = {}
    for group, names in groups.items():
        parts = list(dict.fromkeys(_parts(space, base, names)))
        part_costs = []
        for part in parts:
            c = cost(space.blueprint(_replaced(base, names, part)))
            part_costs.append(Cost(c.params - fixed.params, c.macs - fixed.macs))
        differences |= dict(zip(parts, part_costs, strict=True))
        costs = {name: tuple(getattr(c, name) for c in part_costs) for name in Cost._fields}
        blocks.append(BlockTable(group, tuple(parts), tuple(float(rate(group, part)) for part in parts), costs))
    rng = python_rng("additive", space.name)
    for _ in range(num_checks):
        architecture = space.sample(rng)
        exact = cost(space.blueprint(architecture))
        looked_up = [differences.get(_part(architecture, names)) for names in groups.values()]
        block_costs = [c for c in looked_up if c is not None]
        added = Cost(fixed.params + sum(c.params for c in block_costs), fixed.macs + sum(c.macs for c in block_costs))
        if len(block_costs) < len(looked_up) or added != exact:
            raise ValueError(
                f"costs of {space.name or 'the space'} must be sums over {', '.join(groups)}, but "
                f"{space.code(architecture)} has {exact} and its blocks {added}. Merge blocks that depend on each "
                "other: groups={...}."
            )
    return blocks


def _part(architecture: Mapping[str, Value], names: Sequence[str]) -> Architecture:
    return Architecture({name: architecture[name] for name in names if name in architecture})


def _replaced(base: Architecture, names: Sequence[str], part: Mapping[str, Value]) -> Architecture:
    return Architecture({**{n: v for n, v in base.items() if n not in names}, **part})


def _parts(space: SearchSpace, base: Architecture, names: Sequence[str]) -> Iterator[Architecture]:
    """Every assignment of these choices, in canonical spelling."""
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


def _finite_bounds(blocks: Sequence[BlockTable], bounds: Mapping[str, float]) -> dict[str, float]:
    if not blocks:
        raise ValueError("`blocks` must have at least one block.")
    known = set(blocks[0].costs)
    for block in blocks:
        if set(block.costs) != known:
            raise ValueError(
                f"every block must have the costs {sorted(known)}, got {sorted(block.costs)} of {block.name!r}."
            )
    for name, bound in bounds.items():
        if name not in known:
            raise ValueError(f"`bounds` must be on {', '.join(sorted(known))}, got {name!r}.")
        if math.isnan(bound) or bound == -math.inf:
            raise ValueError(f"the bound on {name} must be a number, got {bound}.")
    return {name: bound for name, bound in bounds.items() if bound < math.inf}


def _infeasible(blocks: Sequence[BlockTable], bounds: Mapping[str, float]) -> Infeasible:
    """The error with the network whose largest relative overshoot is smallest."""
    plain = [BlockTable(b.name, b.options, (0.0,) * len(b.options), b.costs) for b in blocks]
    task = _Task(plain, tuple(bounds), {}, 1)
    states = task.run(None, -math.inf)
    limits = np.array(list(bounds.values()))
    excess = (states.cost - limits) / np.maximum(np.abs(limits), 1.0)
    nearest = task.combination(states, int(excess.max(1).argmin()))
    bounds_text = ", ".join(f"{name} <= {bound:,.6g}" for name, bound in bounds.items())
    costs_text = ", ".join(f"{name} {value:,.6g}" for name, value in nearest.costs.items())
    options = zip(blocks, nearest.options, strict=True)
    chosen = ", ".join(f"{b.name}: {dict(o) if isinstance(o, Mapping) else o}" for b, o in options)
    return Infeasible(
        f"infeasible: no network with {bounds_text}; the nearest has {costs_text} ({chosen}). Raise the budget."
    )


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
            indices = _peeled(scores, costs, num)
            self.tables.append((scores[indices], costs[indices], indices))
        # The least amount that the later blocks add to every cost.
        least = np.array([costs.min(0) if len(names) else np.zeros(0) for _, costs, _ in self.tables])
        self.least_after = np.vstack([np.cumsum(least[::-1], 0)[::-1][1:], np.zeros((1, len(names)))])

    def duals(self) -> NDArray[np.float64] | None:
        """Prices per cost, `[prices, costs]`: each gives an upper bound on the score of the remaining blocks.

        The score of any admissible completion is at most `sum_blocks max_option (score - price * cost) + price *
        room`, for every non-negative price; the price that minimises it is found by subgradient steps.
        """
        if not self.names:
            return None
        spread = np.array([max(np.ptp(costs[:, j]) for _, costs, _ in self.tables) for j in range(len(self.names))])
        spread = np.where(spread > 0, spread, 1.0)
        scale = max(float(np.ptp(scores)) for scores, _, _ in self.tables)
        price, prices, bound = np.zeros(len(self.names)), [], math.inf
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
                prices.append(price)
            # In units of each cost's spread; the step shrinks, as subgradient steps must.
            slope = slope / spread
            price = np.maximum(0.0, price - scale / (1 + 0.15 * step) * slope / (np.abs(slope).max() or 1.0) / spread)
        return np.array(prices[-6:])

    def run(self, duals: NDArray[np.float64] | None, floor: float, beam: int | None = None) -> _States:
        """The final states; with a `floor`, states with an upper bound below it are dropped."""
        score, cost_ = np.zeros(1), np.zeros((1, len(self.names)))
        parents, chosen = [], []
        after = self._after(duals)
        for level, (scores, costs, options) in enumerate(self.tables):
            chunks: list[tuple[Any, ...]] = []
            size = max(1, _MOST_AT_ONCE // len(scores))
            for start in range(0, len(score), size):
                chunk_score = (score[start : start + size, None] + scores).ravel()
                chunk_cost = (cost_[start : start + size, None] + costs).reshape(len(chunk_score), len(self.names))
                index = np.arange(start * len(scores), start * len(scores) + len(chunk_score))
                room = self.limits - chunk_cost - self.least_after[level]
                fits = np.flatnonzero((room >= 0).all(1))
                chunks.append((chunk_score[fits], chunk_cost[fits], index[fits]))
                if len(chunks) > 1 and sum(len(h[0]) for h in chunks) > _MOST_AT_ONCE:
                    chunks = [self._pruned(self._joined(chunks), level, duals, after, floor, beam)]
            new = self._pruned(self._joined(chunks), level, duals, after, floor, beam)
            score, cost_, index = new
            parents.append(index // len(scores))
            chosen.append(options[index % len(scores)])
        return _States(score, cost_, parents, chosen)

    def _joined(self, chunks: Sequence[tuple[Any, ...]]) -> tuple[Any, Any, Any]:
        empty = (np.zeros(0), np.zeros((0, len(self.names))), np.zeros(0, int))
        score, cost_, index = (np.concatenate(columns) for columns in zip(empty, *chunks, strict=True))
        return score, cost_, index

    def _after(self, duals: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """`[levels, prices]`: the largest sum of score minus price times cost of the later blocks."""
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
                # The bound adds the same numbers in another order; rounding must not drop states as good as the floor.
                slack = 1e-9 * (1 + abs(floor) + np.abs(score).max(initial=0.0) + np.abs(after[level]).max())
                if duals is not None:
                    slack += 1e-9 * float(np.abs(duals @ self.limits).max())
                indices = np.flatnonzero(reach >= floor - slack)
                score, cost_, index, reach = score[indices], cost_[indices], index[indices], reach[indices]
            if beam is not None and len(score) > beam:
                indices = np.sort(np.argpartition(-reach, beam)[:beam])
                score, cost_, index = score[indices], cost_[indices], index[indices]
        indices = np.sort(_peeled(score, cost_, self.num))
        return score[indices], cost_[indices], index[indices]

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


def _peeled(score: NDArray[np.float64], cost_: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """Indices of the first `num` fronts: a superset of the states that fewer than `num` others dominate."""
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
