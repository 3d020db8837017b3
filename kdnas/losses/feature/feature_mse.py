"""Mean squared error between paired feature maps."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.losses.stage_pairs import Alignment


@final
class FeatureMse(FeatureLoss):
    r"""Mean squared error between paired feature maps.

    $L = \sum_l w_l \frac{1}{B C H W} \sum_{b,c,h,w} (A_l(s_l) - t_l)^2$ over the pairs $l$, where $A_l$ is a
    1x1 convolution, built where the channels differ (always, for a supernet).

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`, both average-pooled
    to the smaller height and width; tokens are laid out as a map. Divisor: every element of a pair. Needs no
    `prepare` where the channels are equal.

    Default weight 1: a mean needs no other.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.

    Raises:
        ValueError: channels differ and the loss was not prepared; a pair cannot be matched.

    Reference: Gou, Yu, Maybank, Tao, Knowledge Distillation: A Survey, IJCV 2021, section 2.2 (the general form);
        DNA (Li et al., CVPR 2020, equation 5) for one block.
    Differs: `hint` is the method of FitNets, with one middle pair and two stages; this compares all pairs.
    """

    golden: ClassVar[float] = 1.4452524722743456
    alignment: ClassVar[Alignment] = "channels"

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The mean squared difference of one pair."""
        return (student - teacher).square().mean()
