"""The base of losses: student first, teacher second, labels third; a scalar; float32 or better."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from kdnas.losses.stage_pairs import Alignment, StagePairs
from kdnas.numerics import widen
from kdnas.outputs import START, Moment, Outputs


@dataclass(frozen=True)
class Stage:
    """One stage of a method's schedule.

    Attributes:
        name: the paper's name for it.
        share: its share of the training steps; the shares of a loss's stages sum to 1.
        trains: which parameters change: the student's, the loss's own parts, or both.
        uses: the objective: `loss` (this loss alone), `task` (the other terms alone), `both` (their sum), or
            `preparation` (`Loss.preparation`, a function of the teacher's outputs only).
        through: whether the loss needs the student's remaining layers in this stage (`Moment.remaining`).
    """

    name: str
    share: float
    trains: Literal["student", "parts", "both"] = "both"
    uses: Literal["loss", "task", "both", "preparation"] = "both"
    through: bool = False


class Loss(nn.Module, abc.ABC):
    """A distillation loss.

    Subclasses are `@final`, have keyword-only arguments, and implement `compute`. Every call runs in
    float32 (float64 stays float64) with autocast off, and the teacher's outputs are detached.

    Class attributes:
        needs: its inputs: `logits`, `labels`, `features`, `attentions`, `images`.
        uses_teacher: whether it depends on the teacher's outputs; not for a loss of the student and labels only.
        weight: the default weight in a sum, with its origin in the docstring.
        golden: the value on `kdnas.losses.example.example()` in float64, for `kdnas losses --check`.
        dense: it needs logits that are maps, `[batch, classes, height, width]`; its example is dense.
        pairwise: a value over pairs of samples, which changes when the batch is repeated; the docstring explains why.
        own_gradient: the gradient is on purpose not that of the value (a surrogate, a detached target of the
            student's own); the docstring explains why, and the loss's own test checks the gradient.
        clipped: `Objective.teach` limits each parameter's gradient from this loss to the norm of its gradient from the
            other terms.
        discriminator_rates: names of the submodules that are discriminators, and their largest learning rate; it
            follows the training's schedule.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits",)
    uses_teacher: ClassVar[bool] = True
    weight: ClassVar[float] = 1.0
    golden: ClassVar[float | None] = None
    dense: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False
    own_gradient: ClassVar[bool] = False
    clipped: ClassVar[bool] = False
    discriminator_rates: ClassVar[Mapping[str, float]] = {}

    def __init__(self) -> None:
        # Not Module's, which accepts any argument: a Spec with an unknown one is then refused by name.
        super().__init__()

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Build the learnable parts, if any, from one batch of outputs.

        Called once, before the optimizer is built. The base class checks that the outputs contain what `needs` names.

        Args:
            student: outputs of the largest student on at least two images.
            teacher: the teacher's outputs on the same images.
            elastic: whether the student's widths differ from subnet to subnet.

        Raises:
            ValueError: outputs are missing or cannot be matched; the message names both shapes.
        """
        for kind in ("features", "attentions"):
            if kind in self.needs and not (getattr(student, kind) and getattr(teacher, kind)):
                network = "student" if not getattr(student, kind) else "teacher"
                raise ValueError(f"{type(self).__name__} needs {kind}, but the {network} has none.")
        if "logits" in self.needs and student.logits.shape[1:] != teacher.logits.shape[1:]:
            raise ValueError(
                f"{type(self).__name__} compares logits class by class: the student's have shape "
                f"{tuple(student.logits.shape)}, the teacher's {tuple(teacher.logits.shape)}."
            )

    @final
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment = START) -> Tensor:
        """The loss, a scalar.

        Args:
            student: the student's outputs.
            teacher: the teacher's outputs.
            labels: `[batch]`.
            at: where in the training.
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.compute(student.map(widen), teacher.detach().map(widen), labels, at)

    @abc.abstractmethod
    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The loss; the teacher is detached and everything is float32 or float64.

        What changes during a training, a decaying weight for example, follows from `at`; nothing is stored on the loss.
        """

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the loss's schedule. Default: one, `joint`."""
        return (Stage("joint", 1.0),)

    def preparation(self, teacher: Outputs) -> Tensor:
        """The objective of the loss's own parts in a stage with `uses="preparation"`."""
        raise NotImplementedError(f"{type(self).__name__} has no preparation stage")

    @final
    def adversary(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment = START) -> Tensor | None:
        """The discriminator's loss; None without a discriminator.

        The student's outputs are detached, so that its backward pass reaches the discriminator only; `compute` in turn
        runs the discriminator with detached weights (`frozen`), so that the student's does not reach it.
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.discriminate(student.detach().map(widen), teacher.detach().map(widen), labels, at)

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor | None:
        """The discriminator's loss; both sides are detached and everything is float32 or float64."""
        return None


class FeatureLoss(Loss):
    """A loss between paired feature maps: the weighted sum of `between` over the pairs.

    Args:
        taps: the rule of pairing stages: `resolution` (default), `rdm`, `order`, or explicit pairs
            `((student stage, teacher stage), ...)`.
        weights: one weight per pair; default 1 each.

    Class attributes:
        alignment: what the formula needs of a pair: `nothing`, `positions` (equal height and width)
            or `channels` (equal channels too, by a learnable adapter on the student if they differ).
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    alignment: ClassVar[Alignment] = "nothing"

    def __init__(
        self,
        *,
        taps: str | tuple[tuple[int, int], ...] = "resolution",
        weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.taps = StagePairs(pairs=taps, alignment=self.alignment)
        self.pair_weights = weights

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Pair the stages and build the adapters."""
        super().prepare(student, teacher, elastic=elastic)
        self.taps.prepare(student, teacher, elastic)
        if self.pair_weights is not None and len(self.pair_weights) != len(self.taps.pairs):
            raise ValueError(
                f"`weights` must be one per pair, for {len(self.taps.pairs)} pairs got {len(self.pair_weights)}."
            )

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum of `between` over the paired maps."""
        pairs = self.taps(student, teacher)
        weights = self.pair_weights or (1.0,) * len(pairs)
        values = [w * self.between(s, t, i) for i, (w, (s, t)) in enumerate(zip(weights, pairs, strict=True))]
        return torch.stack(values).sum()

    @abc.abstractmethod
    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The loss of one pair of aligned features, a scalar; `pair` is its index."""


def connected_zero(*tensors: Tensor) -> Tensor:
    """Zero with a graph to every tensor: the value of a loss if there is nothing to compare."""
    return torch.stack([t.sum() * 0 for t in tensors if t.numel()]).nan_to_num(0.0, 0.0, 0.0).sum()


def frozen(part: nn.Module, *inputs: Any) -> Tensor:
    """The part's output with a graph to the inputs, not to its weights."""
    weights = {name: parameter.detach() for name, parameter in part.named_parameters()}
    return torch.func.functional_call(part, weights, inputs)
