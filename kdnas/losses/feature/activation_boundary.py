"""Distillation of activation boundaries (AB)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor, nn

from kdnas.losses.base import FeatureLoss, Stage
from kdnas.losses.feature._connectors import Projection, paired_maps, part
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map, same_positions
from kdnas.outputs import Outputs


@final
class ActivationBoundary(FeatureLoss):
    r"""Squared hinge loss that gives the student's pre-activations the signs of the teacher's (AB).

    With $u = r(s)$ the student's map after a connector and $y = 1$ where the teacher's unit is active ($t > 0$), else
    0, $L = \sum_l w_l \frac1B \sum_{b,c,h,w} y \max(0, m - u)^2 + (1 - y) \max(0, m + u)^2$. The weights of the pairs
    are 1 for the last, then 1/2, 1/4, ... towards the first. Equal maps do not give 0 because of the margin.

    Stages: `boundaries` (this loss alone, as an initialisation), then `student` (the other terms alone).
    `staged=False` adds the loss to the other terms throughout.

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`. Where the teacher's
    map is the larger, $y$ is the share of active units, which gives the mean of the loss over them. Divisor: `sum`
    divides by the batch only, so the value grows with the map; `mean` divides by every element.

    Default weight 0.003, for `sum`: the authors' code.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 for the last, 1/2 for the pair before, and so on.
        connector: `conv1x1_norm`, a 1x1 convolution and batch normalisation; `none`, for a student whose stages end
            before the activation and have the teacher's channels; default `conv1x1_norm`.
        margin: $m$, above 0; default 1.
        reduction: `sum` or `mean`; default `sum`.
        staged: train in two stages; default True.

    Raises:
        ValueError: an unknown option, a margin that is not positive; channels that differ without a connector.

    Reference: Heo, Lee, Yun, Choi, Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
        Neurons, AAAI 2019, equations 4 and 7; bhheo/AB_distillation.
    Differs: the authors tap both networks before the ReLU; we see stage outputs. For the teacher that is the same:
        ReLU, leaky ReLU, swish, hard swish and GELU keep the sign that the formula reads. For the student it is not: a
        ReLU's output is never negative and blocks the gradient where it is off. So the connector is there even for
        equal channels (the authors' only for unequal ones), and its signed output is the pre-activation. The
        normalisation is by the batch's own statistics.
    """

    weight: ClassVar[float] = 0.003
    ranges: ClassVar[Mapping[str, str]] = {"margin": "(0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 243.81411212682684

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        connector: Literal["conv1x1_norm", "none"] = "conv1x1_norm",
        margin: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum",
        staged: bool = True,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.connector, self.margin, self.reduction, self.staged = connector, margin, reduction, staged
        self.connectors = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build a connector for each pair."""
        super().build(student, teacher, elastic=elastic)
        self.connectors = nn.ModuleList()
        for s, t in paired_maps(self.taps, student, teacher):
            if self.connector != "none":
                self.connectors.append(Projection(s.shape[1], t.shape[1]).to(s.device))
            elif elastic or s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"connector='none' needs equal channels, got student {tuple(s.shape[1:])} and teacher "
                    f"{tuple(t.shape[1:])}{', with elastic student widths' if elastic else ''}. Use conv1x1_norm."
                )

    def default_weights(self, num_pairs: int) -> tuple[float, ...]:
        """1 for the last pair, 1/2 for the pair before, and so on."""
        return tuple(0.5**k for k in reversed(range(num_pairs)))

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The boundary loss of one pair."""
        u = as_map(student)
        u, y = same_positions(u, (as_map(teacher) > 0).to(u.dtype))
        if self.connector != "none":
            u = part(self.connectors, pair)(u)
        violations = y * (self.margin - u).relu().square() + (1 - y) * (self.margin + u).relu().square()
        return violations.mean() if self.reduction == "mean" else violations.sum() / len(violations)

    def stages(self) -> tuple[Stage, ...]:
        """`boundaries` for a fifth of the steps, then `student`."""
        if not self.staged:
            return super().stages()
        return (Stage("boundaries", 0.2, uses="loss"), Stage("student", 0.8, trains="student", uses="task"))
