"""The flow of the solution procedure: Gram matrices between two stages."""

from typing import ClassVar, Literal, final

from torch import Tensor

from kdnas.losses.base import Stage
from kdnas.losses.relation.base import LayerRelation
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import same_positions

Pool = Literal["max", "average"]
Reduction = Literal["mean", "frobenius"]


@final
class Flow(LayerRelation):
    r"""Mean squared difference between the Gram matrices of consecutive stages (FSP).

    For consecutive stages $f, g$ of one network, pooled to the smaller height and width of the two,
    $G_{bij} = \frac{1}{hw} \sum_{xy} f_{bixy} g_{bjxy}$, and
    $L = \sum_{\text{relations}} w \cdot \operatorname{mean}_{bij} (G^s_{bij} - G^t_{bij})^2$.

    Shapes: maps `[batch, channels, h, w]` or tokens; $G$ is `[batch, channels of f, channels of g]` by one matrix
    product, so the peak is the size of $G$ and never `channels * channels * h * w`.
    Divisor: batch times both channel counts (`mean`), or the batch alone (`frobenius`, the paper's). The value
    grows with the fourth power of the activations.

    Stages: first this loss alone, then the other terms alone. Their shares are
    RepDistiller's 30 and 240 epochs; `staged=False` trains both together. The first stage also trains the adapter.

    Default weight 50: RepDistiller, whose reduction this is.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per relation; default None: 1 each.
        pool: how the larger map of a relation is pooled to the smaller: `max` (the paper) or `average`; default `max`.
        reduction: `mean` over channels, or `frobenius`; default `mean`.
        staged: train in two stages instead of one; default True.

    Raises:
        ValueError: fewer than two pairs of stages, or an unknown pooling or reduction.

    Reference: Yim, Joo, Bae, Kim, A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
        Transfer Learning, CVPR 2017, equations 1 and 2.
    Differs: the mean over channels instead of the Frobenius norm, so that one weight serves all widths. Where
        channels differ, a 1x1 convolution on the student matches them; the paper needs equal channels. Maps of unequal
        size between the networks are average-pooled first. torchdistill sums the norms of the columns, not squared.
    """

    weight: ClassVar[float] = 50.0
    golden: ClassVar[float | None] = 0.027661930561311835

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        pool: Pool = "max",
        reduction: Reduction = "mean",
        staged: bool = True,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.pool, self.reduction, self.staged = pool, reduction, staged

    def relate(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The mean squared difference of the two networks' Gram matrices."""
        student, teacher = (_gram(f, g, self.pool) for f, g in zip(first, second, strict=True))
        squares = (student - teacher).square()
        return squares.mean() if self.reduction == "mean" else squares.sum((1, 2)).mean()

    def stages(self) -> tuple[Stage, ...]:
        """This loss alone, then the task alone; with `staged=False` both at once."""
        if not self.staged:
            return super().stages()
        return (Stage("flow", 1 / 9, uses="loss"), Stage("task", 8 / 9, trains="student", uses="task"))


def _gram(f: Tensor, g: Tensor, pool: str) -> Tensor:
    f, g = same_positions(f, g, pool)
    return f.flatten(2) @ g.flatten(2).transpose(1, 2) / f[0, 0].numel()
