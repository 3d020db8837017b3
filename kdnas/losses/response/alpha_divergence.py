"""Adaptive alpha-divergence between student and teacher distributions."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs
from kdnas.values import Real

# The divergence of one sample is e to the power of the logit gap: no number format holds it at a gap of 1e4.
LARGEST_LOG = 60.0


@final
class AlphaDivergence(Loss):
    r"""Adaptive alpha-divergence: for each sample the larger of two divergences (AlphaNet).

    $D_\alpha(p \| q) = \frac{1}{\alpha (\alpha - 1)} \sum_c q_c [(p_c / q_c)^\alpha - 1]$ with the teacher's
    $p = \mathrm{softmax}(z_t)$ and the student's $q = \mathrm{softmax}(z_s)$; $\alpha \to 1$ is
    $\mathrm{KL}(p \| q)$, $\alpha \to 0$ is $\mathrm{KL}(q \| p)$. A negative $\alpha$ punishes classes that
    the student over-estimates, a large positive one those it under-estimates.

    Value, `clipped`: $\frac{1}{B} \sum_b \max(\hat D_{\alpha_{min}}, \hat D_{\alpha_{max}})$, with $(p_c / q_c)^\alpha$
    in $\hat D$ replaced by $r_c = \min((p_c / q_c)^\alpha, \beta)$: the estimate that is optimised. `divergence`: the
    same without clipping, which a single class of small $p_c$ raises to 10^11 and more; one class contributes at most
    e^60. Both are 0 for equal distributions. The divergence is never negative, nor is the estimate where
    $\alpha_{max} = 1$, whose KL is not clipped; with other $\alpha$ it may be.

    Gradient, of either: with $w_c = q_c r_c / \alpha$,
    $\partial L / \partial z_{s,k} = -\frac{1}{B} (w_k - q_k \sum_c w_c)$. For $\alpha = 1$ nothing is clipped
    ($w = p$); for $\alpha = 0$, $w_c = q_c \log \min(p_c / q_c, \beta)$. It is the gradient of $D_\alpha$
    wherever nothing is clipped. Each sample takes the $\alpha$ with the larger clipped divergence $\hat D$; ties go to
    $\alpha_{max}$.

    A student that is confident and wrong has almost no clipped gradient for an $\alpha$ other than 1, while its
    unclipped $D_{-1}$ is the larger by far; choosing by the clipped divergence sends it to $\alpha = 1$, whose
    gradient does not vanish. With $\alpha_{max} \ne 1$ the gradient of such a student stays small.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]` compared position by position.
    Divisor: batch (times positions); classes are summed. No temperature. Differentiating twice gives the
    derivative of the clipped gradient.

    Args:
        alpha_min: $\alpha_{min}$; default -1. Equal to `alpha_max` for a fixed $\alpha$.
        alpha_max: $\alpha_{max}$; default 1.
        clip: $\beta$, the largest probability ratio, at least 1; default 5.
        value: `clipped` or `divergence`; default `clipped`.

    Raises:
        ValueError: `alpha_min` above `alpha_max`, or `clip` below 1.

    Reference: Wang, Gong, Li, Liu, Chandra, AlphaNet: Improved Training of Supernets with Alpha-Divergence,
        ICML 2021 (arXiv 2102.07954), the adaptive divergence and its clipped gradient.
    Differs: the authors' `loss_ops.py` returns a surrogate with this gradient, whose value is -0.74 at
        alpha = -1 for equal distributions; this returns a divergence. Theirs divides probabilities,
        which is NaN for logits of 80; this works with logarithms. The gradients agree where theirs is finite.
    """

    own_gradient: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, str]] = {"alpha_min": "(-inf, inf)", "alpha_max": "(-inf, inf)", "clip": "[1, inf)"}
    golden: ClassVar[float] = 1.5341825487495855

    def __init__(
        self,
        *,
        alpha_min: Real = -1.0,
        alpha_max: Real = 1.0,
        clip: float = 5.0,
        value: Literal["clipped", "divergence"] = "clipped",
    ) -> None:
        super().__init__()
        if not alpha_min <= alpha_max:
            raise ValueError(f"`alpha_min` must not exceed `alpha_max`, got {alpha_min} and {alpha_max}.")
        self.alpha_min, self.alpha_max, self.clip, self.value = alpha_min, alpha_max, clip, value

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The divergence, averaged over samples."""
        z_s, z_t = student.logits.movedim(1, -1), teacher.logits.movedim(1, -1)
        values = _ClippedGradient.apply(z_s, z_t, self.alpha_min, self.alpha_max, self.clip, self.value == "clipped")
        return values.mean()


class _ClippedGradient(torch.autograd.Function):
    """The larger divergence, clipped or not, as the value, the clipped estimate as the gradient."""

    @staticmethod
    def forward(z_s: Tensor, z_t: Tensor, alpha_min: float, alpha_max: float, clip: float, clipped: bool) -> Tensor:
        # float64: the second-order terms of nearly equal distributions are lost in float32.
        log_p, log_q = z_t.double().log_softmax(-1), z_s.double().log_softmax(-1)
        if not clipped:
            low, high = (_divergence(log_p, log_q, alpha, math.inf) for alpha in (alpha_min, alpha_max))
            return torch.maximum(low, high).to(z_s.dtype)
        low, high = (_clipped(log_p, log_q, alpha, clip)[0] for alpha in (alpha_min, alpha_max))
        of_low, of_high = (_divergence(log_p, log_q, alpha, clip) for alpha in (alpha_min, alpha_max))
        return torch.where(low > high, of_low, of_high).to(z_s.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z_s, z_t, *ctx.settings, _ = inputs
        ctx.save_for_backward(z_s, z_t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        z_s, z_t = ctx.saved_tensors
        alpha_min, alpha_max, clip = ctx.settings
        log_p, log_q = z_t.double().log_softmax(-1), z_s.double().log_softmax(-1)
        low, low_weights = _clipped(log_p, log_q, alpha_min, clip)
        high, high_weights = _clipped(log_p, log_q, alpha_max, clip)
        weights = torch.where((low > high)[..., None], low_weights, high_weights)
        slope = log_q.exp() * weights.sum(-1, keepdim=True) - weights
        return gradient[..., None] * slope.to(z_s.dtype), None, None, None, None, None


def _divergence(log_p: Tensor, log_q: Tensor, alpha: float, clip: float) -> Tensor:
    # Adding alpha * sum(q - p) = 0 makes every class's term a convex function of p/q that touches 0 at p = q:
    # nothing cancels between classes. expm1 keeps the digits of terms close to 0.
    p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
    near = gap.abs() < 1
    small = gap.clamp(-1, 1)
    most = math.inf if alpha == 1 else math.log(clip)
    if alpha == 1:
        terms = torch.where(near, q * (small * small.exp() - small.expm1()), p * gap - (p - q))
    elif alpha == 0:
        terms = torch.where(near, q * (small.expm1() - small.clamp_max(most)), (p - q) - q * gap.clamp_max(most))
    else:
        power = (log_q + (alpha * gap).clamp_max(most)).clamp_max(LARGEST_LOG).exp()
        far = power - q - alpha * (p - q)
        close = q * ((alpha * small).clamp_max(most).expm1() - alpha * small.expm1())
        terms = torch.where(near, close, far) / (alpha * (alpha - 1))
    # Rounding only: a clipped term may be negative.
    is_whole = (alpha * gap if alpha else gap) <= most
    return torch.where(is_whole, terms.clamp_min(0), terms).sum(-1)


def _clipped(log_p: Tensor, log_q: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """The divergence with clipped ratios, which chooses alpha, and the weights `w` of the gradient."""
    q, gap = log_q.exp(), log_p - log_q
    if alpha == 1:
        p = log_p.exp()
        return (p * gap).sum(-1), p
    if alpha == 0:
        weights = q * gap.clamp_max(math.log(clip))
        return -weights.sum(-1), weights
    ratio = (alpha * gap).clamp_max(math.log(clip))
    return (q * ratio.expm1()).sum(-1) / (alpha * (alpha - 1)), q * ratio.exp() / alpha
