"""Feature maps of a network that was cut out of its teacher, channel by channel."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map, centre, safe_norm, same_positions
from kdnas.outputs import Moment, Outputs

_LEAST = 0.1  # of the mean deviation: channels that hardly vary must not count without bound
_DEAD = 1e-3  # of the student's size: a stage of the teacher that varies less is not matched in its own units


@final
class LeadingChannels(FeatureLoss):
    r"""Squared distance of a stage's channels from the teacher's first ones, in units of their deviation.

    For a student cut out of its teacher, whose channels are sorted so that those of every smaller network come first
    (`kdnas.conversion.importance`): channel c of the student is channel c of the teacher, and no adapter is needed.

    $L = \frac{w}{P} \sum_{p=1}^{P} \frac{1}{B C_p H_p W_p} \sum \left(\frac{s_c - t_c}{\sigma_c}\right)^2$,
    $w = \max(0, 1 - \tau / u)$

    with $\sigma_c$ the deviation of the teacher's channel over the batch and its positions, at least a tenth of the
    mean deviation of the stage; where that is less than a thousandth of the root mean square of the student's map, as
    in a dead stage, it is the latter (held constant) instead, and 1 where both are 0; $C_p$ the student's channels;
    $P$ the number of pairs; $\tau$ the share of the training that is done and $u$ the share after which the weight is
    0 (`until`): at the end labels and logits decide.

    Shapes: student `[batch, C, h, w]`, teacher `[batch, at least C channels, h', w']`, pooled to the smaller height and
    width; tokens are laid out as a map.

    Default weight 10: of 1, 3, 10 and 30 the best on CIFAR-10 at an eighth of a ResNet's MACs, beside 0.5
    cross-entropy and 0.5 soft targets; 30 is level.

    Args:
        taps: how stages are paired: `order` (default), or as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.
        until: u; default 1; None for a constant weight. Matching helps to recover from the cut and hinders
            afterwards: `kdnas prune` ends it after 1,000 steps. At an eighth of a ResNet's MACs with 3,000 steps of
            CIFAR-10, matched over all of them 71.7 %, over 900 of them 72.4 %, never 72.2 % (one seed); with 700 steps,
            over all, half or a third of them 69.7, 70.0 and 70.1 %.

    Raises:
        ValueError: `until` is out of range, the teacher has fewer channels than the student; options of `FeatureLoss`.

    Reference: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation 3, without a regressor. Units of
        deviation, every stage and the falling weight are ours.

    Example:
        >>> import torch
        >>> from kdnas.outputs import Outputs
        >>> teacher = Outputs(torch.zeros(4, 3), (torch.randn(4, 8, 5, 5),))
        >>> student = Outputs(torch.zeros(4, 3), (teacher.features[0][:, :6],))
        >>> float(LeadingChannels()(student, teacher, torch.zeros(4, dtype=torch.long)))
        0.0
    """

    weight: ClassVar[float] = 10.0
    whole_batch: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, str]] = {"until": "(0, 1]"}
    golden: ClassVar[float] = 1.9050775346086033

    def __init__(
        self, *, taps: str | Pairs = "order", weights: tuple[float, ...] | None = None, until: float | None = 1.0
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.until = until

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages; the largest student must not be wider than the teacher."""
        super().build(student, teacher, elastic=elastic)
        for s, t in self.taps(student, teacher):
            if as_map(s).shape[1] > as_map(t).shape[1]:
                raise ValueError(
                    f"LeadingChannels needs a teacher at least as wide as the student, got student {tuple(s.shape)} "
                    f"and teacher {tuple(t.shape)}. Use a loss with a regressor, such as hint."
                )

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The mean over the pairs, times the share that is left of the steps in which channels are matched."""
        left = 1.0 if self.until is None else max(0.0, 1 - at.progress / self.until)
        return super().compute(student, teacher, labels, at) * (left / max(1, len(self.taps.pairs)))

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The mean squared distance of one stage, in the teacher's deviations."""
        s, t = same_positions(as_map(student), as_map(teacher))
        t = t[:, : s.shape[1]]
        values = centre(t.transpose(0, 1).flatten(1))
        deviation = safe_norm(values) / values.shape[1] ** 0.5
        mean, size = deviation.mean(), safe_norm(s.detach().flatten()) / s.numel() ** 0.5
        unit = torch.where(mean > _DEAD * size, deviation.maximum(_LEAST * mean), torch.where(size > 0, size, 1.0))
        return ((s - t) / unit[None, :, None, None]).square().mean()
