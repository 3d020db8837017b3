"""Base class of the losses between consecutive stages."""

import abc
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.losses.stage_pairs import Pairs, StagePair, StagePairs
from kdnas.outputs import Moment, Outputs


class LayerRelation(Loss):
    """A loss on the relation of one stage to the next: the weighted sum of `relate` over consecutive pairs of stages.

    Where channels differ, an adapter maps the student's to the teacher's, and the larger of two maps is average-pooled
    to the smaller; `describe` then turns each pair of maps into the tensors that are compared.

    Args:
        taps: how stages are paired, at least two pairs: `resolution` (default), `rdm`, `order` or explicit pairs, as in
            `StagePairs`.
        weights: one weight per relation, one fewer than pairs; default None: 1 each.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    ranges: ClassVar[Mapping[str, str]] = {"weights": "[0, inf)"}

    def __init__(self, *, taps: str | Pairs = "resolution", weights: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.taps = StagePairs(pairs=taps, alignment="channels")
        self.weights = weights

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages and build the adapters."""
        self.build_parts(self.taps.prepare(student, teacher, elastic))
        self._check(len(self.taps.pairs))

    def build_parts(self, pairs: tuple[StagePair, ...]) -> None:
        """Build further learnable parts for the paired stages; none by default."""

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum over consecutive stages."""
        described = [self.describe(s, t) for s, t in self.taps(student, teacher)]
        self._check(len(described))
        weights = self.weights or (1.0,) * (len(described) - 1)
        return torch.stack(
            [w * self.relate(described[i], described[i + 1], i) for i, w in enumerate(weights)],
        ).sum()

    def describe(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors to compare of a pair of aligned maps; by default the maps."""
        return student, teacher

    @abc.abstractmethod
    def relate(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one relation, a scalar, from the (student, teacher) tensors of two consecutive stages."""

    def _check(self, num_pairs: int) -> None:
        if num_pairs < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 pairs of stages, got {num_pairs}: it relates each to the next."
            )
        if self.weights is not None and len(self.weights) != num_pairs - 1:
            raise ValueError(
                f"`weights` must have one number per relation between consecutive stages: {num_pairs - 1} relations, "
                f"got {len(self.weights)}."
            )
