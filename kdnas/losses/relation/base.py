"""What the losses between consecutive stages share."""

import abc
from typing import ClassVar

import torch
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.losses.stage_pairs import Pairs, Row, StagePairs
from kdnas.outputs import Moment, Outputs


class LayerRelation(Loss):
    """A loss on how one stage leads to the next: the weighted sum of `relate` over neighbouring pairs of stages.

    The student's maps are brought to the teacher's channels by an adapter where they differ, and the larger of two
    maps is average-pooled to the smaller; `describe` then turns each pair of maps into what is compared.

    Args:
        taps: how stages are paired, at least two pairs: see `kdnas.losses.stage_pairs.Taps`.
        weights: one weight per relation (one fewer than pairs); default 1 each.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)

    def __init__(self, *, taps: str | Pairs = "resolution", weights: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.taps = StagePairs(pairs=taps, alignment="channels")
        self.weights = weights

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Pair the stages and build the adapters."""
        super().prepare(student, teacher, elastic=elastic)
        self.build(self.taps.prepare(student, teacher, elastic))
        self._check(len(self.taps.pairs))

    def build(self, rows: tuple[Row, ...]) -> None:
        """Build further learnable parts for the paired stages; none by default."""

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum over neighbouring stages."""
        described = [self.describe(s, t) for s, t in self.taps(student, teacher)]
        self._check(len(described))
        weights = self.weights or (1.0,) * (len(described) - 1)
        return torch.stack(
            [w * self.relate(described[i], described[i + 1], i) for i, w in enumerate(weights)],
        ).sum()

    def describe(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared of one pair of aligned maps; the maps themselves by default."""
        return student, teacher

    @abc.abstractmethod
    def relate(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one relation, a scalar, from two neighbouring stages' (student, teacher)."""

    def _check(self, num_pairs: int) -> None:
        if num_pairs < 2:
            raise ValueError(
                f"{type(self).__name__} relates a stage to the next and needs at least 2 pairs of stages, got "
                f"{num_pairs}."
            )
        if self.weights is not None and len(self.weights) != num_pairs - 1:
            raise ValueError(
                f"weights needs one number per relation between neighbouring stages: {num_pairs - 1} relations, "
                f"got {len(self.weights)}."
            )
