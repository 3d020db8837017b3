"""Hints from a hidden layer of the teacher (FitNets)."""

from typing import ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import FeatureLoss, Stage
from kdnas.losses.feature._connectors import LeadingConvolution, Projection, paired_maps, part
from kdnas.losses.stage_pairs import Adapter, Pairs, StagePairs
from kdnas.numerics import as_map, safe_normalize, same_positions
from kdnas.outputs import Outputs

Regressor = Literal["none", "conv1x1", "conv1x1_norm", "conv"]
Difference = Literal["mse", "smooth_l1", "l1", "cosine", "normalised"]


@final
class Hint(FeatureLoss):
    r"""Distance between a student layer, mapped by a regressor, and a teacher layer (FitNets).

    With $r$ the regressor, $s$ the student's guided layer, $t$ the teacher's hint layer and $u = r(s)$, $L$ is

    - `mse`: $\frac{1}{B C H W} \sum (u - t)^2$;
    - `smooth_l1`: the same mean of $\frac12 d^2$ for $|d| < 1$, $|d| - \frac12$ beyond;
    - `l1`: the same mean of $|u - t|$;
    - `cosine`: $1 - \cos$ between the channel vectors at one position, averaged over batch and positions;
    - `normalised`: $\frac1B \sum_b |\hat u_b - \hat t_b|^2$, each sample's whole map of length 1.

    Stages: `hint` (this loss alone: only the student up to the guided layer and the regressor get a gradient, which
    is how FitNets train the lower half first), then `student` (the other terms alone, on the whole student).
    `staged=False` adds the loss to the other terms throughout.

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`, pooled to the
    smaller height and width; tokens are laid out as a map. A zero vector has cosine 0 with every other.

    Default weight 100: RepDistiller, mdistiller and SemCKD, for `mse` added to the labels.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.
        layers: of the pairs that a rule gives use the `middle` (of two, the shallower) or `all`; explicit pairs are all
            used. Default `middle`.
        regressor: `conv1x1`; `conv1x1_norm`, with batch normalisation; `conv`, the paper's convolution without
            padding, whose kernel covers the difference of the two sizes; `none`, which needs equal channels. Default
            `conv1x1`.
        difference: the distance between $u$ and $t$; default `mse`.
        staged: train in two stages; default True.

    Raises:
        ValueError: an unknown option; channels that differ without a regressor; `conv` where the student's map is the
            smaller; a loss that was not prepared.

    Reference: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation 3 and algorithm 1.
    Differs: the mean over elements where the paper has half the sum, as common code has. The regressor is linear (no
        ReLU after it): stage outputs need not be positive.
    """

    weight: ClassVar[float] = 100.0
    golden: ClassVar[float] = 0.7282698703085505

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        layers: Literal["middle", "all"] = "middle",
        regressor: Regressor = "conv1x1",
        difference: Difference = "mse",
        staged: bool = True,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.rule, self.layers, self.regressor = taps, layers, regressor
        self.difference, self.staged = difference, staged
        self.regressors = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Choose the pairs and build the regressors."""
        if self.layers == "middle" and isinstance(self.rule, str) and student.features and teacher.features:
            pairs = StagePairs(pairs=self.rule).prepare(student, teacher)
            # Lower middle: the deeper the guided layer, the less freedom the student keeps (section 2.2).
            middle = pairs[(len(pairs) - 1) // 2]
            self.taps = StagePairs(pairs=((middle.student, middle.teacher),))
        super().build(student, teacher, elastic=elastic)
        self.regressors = nn.ModuleList()
        for s, t in paired_maps(self.taps, student, teacher):
            self.regressors.append(self._build_regressor(s, t, elastic).to(s.device))

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The difference of one pair, in the teacher's channels."""
        u, t = as_map(student), as_map(teacher)
        regressor = part(self.regressors, pair)
        if self.regressor == "conv":
            u, t = same_positions(regressor(u), t)
        else:
            u, t = same_positions(u, t)
            u = regressor(u)
        if self.difference == "mse":
            return (u - t).square().mean()
        if self.difference == "smooth_l1":
            return F.smooth_l1_loss(u, t)
        if self.difference == "l1":
            return (u - t).abs().mean()
        if self.difference == "cosine":
            return (1 - (safe_normalize(u, 1) * safe_normalize(t, 1)).sum(1)).mean()
        return (safe_normalize(u.flatten(1)) - safe_normalize(t.flatten(1))).square().sum(1).mean()

    def stages(self) -> tuple[Stage, ...]:
        """`hint` for a third of the steps, then `student`."""
        if not self.staged:
            return super().stages()
        return (Stage("hint", 1 / 3, uses="loss"), Stage("student", 2 / 3, trains="student", uses="task"))

    def _build_regressor(self, s: Tensor, t: Tensor, elastic: bool) -> nn.Module:
        if self.regressor == "conv1x1":
            return Adapter(s.shape[1], t.shape[1])
        if self.regressor == "conv1x1_norm":
            return Projection(s.shape[1], t.shape[1])
        if self.regressor == "conv":
            kernel = (s.shape[2] - t.shape[2] + 1, s.shape[3] - t.shape[3] + 1)
            if min(kernel) < 1:
                raise ValueError(
                    "regressor='conv' needs a student map of at least the teacher's size, got student "
                    f"{tuple(s.shape[1:])} and teacher {tuple(t.shape[1:])}. Use conv1x1, which pools the teacher's."
                )
            return LeadingConvolution(s.shape[1], t.shape[1], kernel, bias=False)
        if elastic or s.shape[1] != t.shape[1]:
            raise ValueError(
                f"regressor='none' needs equal channels, got student {tuple(s.shape[1:])} and teacher "
                f"{tuple(t.shape[1:])}{', with elastic student widths' if elastic else ''}. Use conv1x1."
            )
        return nn.Identity()
