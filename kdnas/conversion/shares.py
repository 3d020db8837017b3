"""How many channels each group of a network keeps, and which blocks, within a budget: searched under the network."""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.conversion.channels import ChannelGroup
from kdnas.conversion.removal import Counts, Masks, Removal, ResidualBlock, floor_of
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.network import Network, batch_statistics, image_batches
from kdnas.space import Blueprint
from kdnas.statistics import apart

_SPREAD = 0.35  # standard deviation of the first tilts' logarithms; half of it around a parent
_PARENTS = 8
_APART = 0.05
_BISECTIONS = 14
_MEASUREMENTS = 5  # of whole networks, for each candidate
_MARGIN = 1.01  # by which a budget shrinks where a network is still over it
_FLIP = 0.3  # probability that a child differs from its parent by a block too


class Candidate(NamedTuple):
    """A removal within the budget.

    Attributes:
        score: the mean log probability ratio; see `agreement`.
        counts: what stays.
        tilts: by a group's key, its share relative to the common one.
    """

    score: float
    counts: Counts
    tilts: Mapping[str, float]


@final
@dataclass
class ShareSearch:
    r"""Searches the share of channels that each group keeps, and the blocks, by an evolution of tilts.

    A candidate has a tilt $t_g > 0$ for each group g and a set of removed blocks; group g keeps $s t_g$ of its
    channels with the largest common $s$ whose network the budget admits. The first candidate has equal shares
    ($t_g = 1$); then follows one for each block that is removed alone, and where the budget admits none of these, one
    without any block that may go; then tilts around 1, log-normal with deviation
    0.35; from a third of the candidates on around one of the best eight, with half that deviation, and with probability
    0.3 one block more or less.

    Where a cost is predicted, as a latency is from a table of layers, the prediction errs, and a search prefers the
    networks that it flatters. So at the end the best few, and equal shares, are measured whole, and the common share
    of each is fitted to what its network costs; they are the candidates that are left.

    Attributes:
        removal: of the network whose channels are sorted, the most important first.
        admits: whether a network is within the budget, if it costs so many times of what is predicted (second
            argument; without it, what is predicted).
        score: of counts; higher is better.
        divisor: the number of channels is a multiple of it where the group has more than that; 0 for 8, and for 4 in
            groups below 64 channels.
        measured: how many times of what is predicted a network costs; None where the costs are exact.
        candidates: all that were tried, in order; after measuring, those that were measured.
    """

    removal: Removal
    admits: Callable[..., bool]
    score: Callable[[Counts], float]
    divisor: int = 1
    measured: Callable[[Blueprint], float] | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def __post_init__(self) -> None:
        units = self.removal.units
        self.groups = [unit for unit in units if isinstance(unit, ChannelGroup)]
        self.blocks = [unit for unit in units if isinstance(unit, ResidualBlock)]

    @property
    def best(self) -> Candidate:
        """The candidate of the highest score."""
        return max(self.candidates, key=lambda candidate: candidate.score)

    @property
    def least(self) -> Counts:
        """The smallest network: the floor of every group, without all blocks that may go."""
        return self._counts(0.0, self._equal(), {block.key for block in self.blocks})

    def finalists(self, count: int) -> list[Candidate]:
        """The best candidates, each next one apart from those before it: some share differs by a twentieth or more."""
        return apart(sorted(self.candidates, key=lambda c: -c.score), count, self._distance, _APART)

    def _distance(self, first: Candidate, second: Candidate) -> float:
        sizes = self.removal.sizes
        return max(abs(first.counts[key] - second.counts[key]) / size for key, size in sizes.items())

    def fit(
        self, tilts: Mapping[str, float], gone: frozenset[str] = frozenset(), times: float | None = None
    ) -> Counts | None:
        """The counts of the largest common share within the budget; None where even the floors are over it.

        Args:
            tilts: by a group's key.
            gone: keys of the blocks that are removed.
            times: what networks cost relative to what is predicted; None for the prediction.
        """
        more = () if times is None else (times,)

        def admits(share: float) -> bool:
            return self.admits(self.removal.blueprint(self._counts(share, tilts, gone)), *more)

        if not admits(0.0):
            return None
        low, high = 0.0, 1 / min(tilts.values())
        if admits(high):
            return self._counts(high, tilts, gone)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if admits(middle) else (low, middle)
        return self._counts(low, tilts, gone)

    def equal_shares(self) -> Counts | None:
        """Equal shares of all groups, every block; None where the budget is too small for any."""
        return self.fit(self._equal()) if self.measured is None else self._fit_measured(self._equal(), frozenset())

    def _fit_measured(self, tilts: Mapping[str, float], gone: frozenset[str]) -> Counts | None:
        """The largest of a few counts whose network, measured, is within the budget; None where none is."""
        assert self.measured is not None
        kept: Counts | None = None
        most, times, margin = -1, None, 1.0
        for _ in range(_MEASUREMENTS):
            counts = self.fit(tilts, gone, times)
            if counts is None:
                break
            blueprint = self.removal.blueprint(counts)
            times = self.measured(blueprint)
            macs = cost(blueprint).macs
            if not self.admits(blueprint, times):
                margin *= _MARGIN
                times *= margin
            elif macs > most:
                kept, most = counts, macs
            else:  # what the measurement allows is no more than what is kept
                break
        return kept

    def _measure(self, keep: int) -> None:
        """Leave the best candidates alone, each as large as its measured cost admits, and scored again."""
        candidates = []
        best = self.finalists(keep)
        for candidate in best if self.candidates[0] in best else [*best, self.candidates[0]]:
            gone = frozenset(block.key for block in self.blocks if not candidate.counts[block.key])
            if (counts := self._fit_measured(candidate.tilts, gone)) is not None:
                candidates.append(candidate._replace(score=self.score(counts), counts=counts))
        self.candidates = candidates

    def run(
        self,
        count: int,
        rng: random.Random,
        watch: Callable[[int, float], None] = lambda done, best: None,
        keep: int = 5,
        seconds: float = math.inf,
    ) -> None:
        """Try so many candidates.

        Args:
            count: of candidates that fit the budget, and of attempts at most four times as many.
            rng: of the tilts.
            watch: called after each candidate with their number and the best score.
            keep: of the best candidates that are measured, where costs are predicted.
            seconds: time after which no further candidate is begun; one is tried in any case.

        Raises:
            Infeasible: no candidate was within the budget.
        """
        began, equal = time.perf_counter(), self._equal()
        planned = [(equal, frozenset[str]()), *((equal, frozenset({block.key})) for block in self.blocks)]
        for attempt in range(max(4 * count, len(planned) + 1)):
            late = self.candidates and time.perf_counter() - began >= seconds
            if late or len(self.candidates) >= count:
                break
            if attempt == len(planned) and not self.candidates:  # a budget that asks for several blocks less
                planned.append((equal, frozenset(block.key for block in self.blocks)))
            tilts, gone = planned[attempt] if attempt < len(planned) else self._draw(count, rng)
            if (counts := self.fit(tilts, gone)) is not None:
                self.candidates.append(Candidate(self.score(counts), counts, tilts))
                watch(len(self.candidates), self.best.score)
        if self.candidates and self.measured is not None:
            self._measure(keep)
        if not self.candidates:
            raise Infeasible(
                "no share of the channels is within the budget. Raise it, or start from a smaller network."
            )

    def _draw(self, count: int, rng: random.Random) -> tuple[dict[str, float], frozenset[str]]:
        tilts, gone, spread = self._equal(), set[str](), _SPREAD
        fits_whole = not self.candidates or all(self.candidates[0].counts[block.key] for block in self.blocks)
        if self.candidates and (not fits_whole or len(self.candidates) >= count / 3):
            best = sorted(self.candidates, key=lambda candidate: -candidate.score)[:_PARENTS]
            parent = rng.choice(best)
            tilts, spread = dict(parent.tilts), _SPREAD / 2
            gone = {block.key for block in self.blocks if not parent.counts[block.key]}
        if self.blocks and rng.random() < _FLIP:
            gone ^= {rng.choice(self.blocks).key}
        return {key: tilt * math.exp(rng.gauss(0, spread)) for key, tilt in tilts.items()}, frozenset(gone)

    def _equal(self) -> dict[str, float]:
        return dict.fromkeys((group.key for group in self.groups), 1.0)

    def _counts(self, share: float, tilts: Mapping[str, float], gone: set[str] | frozenset[str]) -> Counts:
        counts = {block.key: int(block.key not in gone) for block in self.blocks}
        for group in self.groups:
            unit = group.multiple if group.size <= self.divisor else group.unit(self.divisor)
            least = math.ceil(floor_of(group) / unit) * unit
            counts[group.key] = min(group.size, max(least, round(group.size * share * tilts[group.key] / unit) * unit))
        return counts


def leading(removal: Removal, counts: Counts) -> Masks:
    """The masks that keep the first channels of every group."""
    return {unit.key: torch.arange(unit.size) < counts[unit.key] for unit in removal.units}


def divergence(own: Tensor, target: Tensor) -> Tensor:
    r"""$\sum_n \mathrm{KL}(p_n \| q_n)$ of the classes of logits `own` (q) from log probabilities `target` (p)."""
    return F.kl_div(own.log_softmax(1), target, reduction="sum", log_target=True)


def agreement(
    network: Network,
    images: Tensor,
    target: Tensor,
    batch: int = 500,
    distance: Callable[..., Tensor] = divergence,
    labels: Tensor | None = None,
) -> float:
    r"""How well a network agrees with its source: $-\frac1N \sum_n d(q_n, p_n)$, batch norms by batch.

    Args:
        network: the smaller one.
        images: `[N, channels, height, width]`, normalised.
        target: what the source says of the images, as `distance` takes it: `[N, classes]` log probabilities.
        batch: largest number of images that share batch norm statistics; fewer where they are large.
        distance: of outputs from the target, a sum over images; `divergence`, or `Task.divergence` with labels.
        labels: `[N, ...]`, for a distance that takes them as its third argument.
    """
    total = torch.zeros((), dtype=torch.float64)
    count = max(math.ceil(len(images) / batch), len(image_batches(images)))
    with torch.no_grad(), batch_statistics(network):
        tensors = [images, target, *([] if labels is None else [labels])]
        for part, *others in zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True):
            total -= distance(network(part).logits.float(), *others).double().cpu()
    return float(total) / len(images)
