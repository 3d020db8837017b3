"""Channel-wise distillation (CWD)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.losses.stage_pairs import Alignment, Pairs
from kdnas.numerics import same_positions
from kdnas.outputs import Moment, Outputs


@final
class ChannelWise(FeatureLoss):
    r"""KL divergence between each channel's distribution over positions (CWD).

    A channel $c$ of sample $b$ becomes a distribution over its $H W$ positions, $q_{bc} = \mathrm{softmax}_{hw}(t_{bc}
    / T)$ of the teacher and $p_{bc} = \mathrm{softmax}_{hw}(s_{bc} / T)$. Summed over the pairs of maps,
    $L = T^2 \frac{1}{B C} \sum_{b,c} \sum_{hw} q_{bc,hw} (\log q_{bc,hw} - \log p_{bc,hw})$.

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`, both average-pooled
    to the smaller height and width, the student's channels matched by a 1x1 convolution where they differ (always, for
    a supernet); or, with `maps="logits"`, dense logits of equal classes. Divisor: batch times channels; positions are
    summed. One position: 0. Adding a number to a channel changes nothing.

    Default weight 10, with T = 1: mmrazor, for the feature maps of detectors (5 for the logits of segmentation, the
    authors' script there 3 with T = 4).

    Args:
        maps: `features`, or `logits` of dense prediction, where a channel is a class; default `features`.
        temperature: $T$, above 0; higher for a wider part of each map; default 1.
        taps: how stages are paired, as in `StagePairs`; default ((-1, -1),): the last stage of each.
        weights: one weight per pair; default None: 1 each.

    Raises:
        ValueError: an option out of range, a pair that cannot be matched, or, for `logits`, logits without positions.

    Reference: Shu, Liu, Gao, Yan, Shen, Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021 (arXiv
        2011.13256), section 3.2.
    Differs: no difference in the formula. Maps of unequal size are pooled; the authors' need equal ones.
    """

    weight: ClassVar[float] = 10.0
    ranges: ClassVar[Mapping[str, str]] = {"temperature": "(0, inf)"}
    golden: ClassVar[float] = 0.27524576828006764
    alignment: ClassVar[Alignment] = "channels"

    def __init__(
        self,
        *,
        maps: Literal["features", "logits"] = "features",
        temperature: float = 1.0,
        taps: str | Pairs = ((-1, -1),),
        weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.maps, self.temperature = maps, temperature
        self.needs, self.dense = (maps,), maps == "logits"  # type: ignore[misc]

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages and build the adapters; logits need none."""
        if self.maps == "features":
            super().build(student, teacher, elastic=elastic)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum over the pairs, or the divergence of the logits."""
        if self.maps == "features":
            return super().compute(student, teacher, labels, at)
        return self.between(*same_positions(student.logits, teacher.logits), 0)

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The divergence of one pair of aligned maps."""
        log_p, log_q = ((x.flatten(2) / self.temperature).log_softmax(2) for x in (student, teacher))
        return (log_q.exp() * (log_q - log_p)).sum(2).mean() * self.temperature**2
