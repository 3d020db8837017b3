"""Attention transfer (AT)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.losses.feature._attention_map import EXPONENTS, Pool, attention_map
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map, rescale, safe_norm, safe_normalize, same_positions


@final
class AttentionTransfer(FeatureLoss):
    r"""Distance between the unit-length spatial attention maps of student and teacher (AT).

    A map's attention is $Q = \sum_c |f_c|$ (`sum`), $\sum_c |f_c|^p$ (`sum_p`) or $\max_c |f_c|^p$ (`max_p`), over
    positions; $\hat Q_b = Q_b / |Q_b|_2$ per sample. Summed over the pairs,

    - `mean`: $L = \frac{1}{B H W} \sum_b |\hat Q^s_b - \hat Q^t_b|_2^2$;
    - `paper`: $L = \frac{1}{2 B} \sum_b |\hat Q^s_b - \hat Q^t_b|_2$, the norm itself, about a hundred times as large.

    `gradient`, the paper's second kind: $Q = f$ with all channels and without normalisation. The features are then
    gradients $\partial \mathrm{CE} / \partial x$ of both networks, as `kdnas.losses.Recorder.gradients` gives. The
    paper's reduction is `paper`, $\frac{1}{2 B} \sum_b |Q^s_b - Q^t_b|_2$. The student is then differentiated twice.

    Shapes: maps of any channels; where sizes differ the larger attention map is average-pooled. A dead sample's
    attention is 0 with gradient 0. `paper` has gradient 0 between equal maps.

    Default weight 1000, for `mean`: the authors' code, RepDistiller, mdistiller.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.
        pool: the reduction over channels: `sum`, `sum_p` or `max_p`; `gradient` for none; default `sum_p`.
        p: the exponent, in [1, 4]; default 2.
        reduction: `mean`, as the authors' code, or `paper`, as their equation; default `mean`.

    Raises:
        ValueError: an unknown option or an exponent out of range; gradients of unequal channels.

    Reference: Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1 and equation 2;
        szagoruyko/attention-transfer utils.py.
    Differs: `mean` is the code, `paper` the equation; the two differ. The absolute value is taken before the
        power, which code with odd p leaves out. Attention maps are pooled, not features. `sum` and `sum_p` equal
        means over channels, since the normalisation cancels the factor.
    """

    weight: ClassVar[float] = 1000.0
    ranges: ClassVar[Mapping[str, str]] = {"p": EXPONENTS}
    golden: ClassVar[float] = 0.019854213603573586

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        pool: Pool | Literal["gradient"] = "sum_p",
        p: float = 2.0,
        reduction: Literal["mean", "paper"] = "mean",
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.pool, self.p, self.reduction = pool, p, reduction

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The difference of one pair's attention maps."""
        if self.pool == "gradient":
            s, t = same_positions(as_map(student), as_map(teacher))
            if s.shape != t.shape:
                raise ValueError(
                    f"gradients must have equal channels, got student {tuple(s.shape)} and teacher {tuple(t.shape)}. "
                    "Take those with respect to the images."
                )
            difference = s.flatten(1) - t.flatten(1)
        else:
            s, t = same_positions(self._attention(student, self.pool), self._attention(teacher, self.pool))
            difference = safe_normalize(s.flatten(1)) - safe_normalize(t.flatten(1))
        if self.reduction == "mean":
            return difference.square().mean()
        return safe_norm(difference).mean() / 2

    def _attention(self, feature: Tensor, pool: Pool) -> Tensor:
        # The normalisation cancels any scale per sample, so powers of rescaled maps give the same value.
        return attention_map(rescale(as_map(feature), (1, 2, 3)), pool, self.p)
