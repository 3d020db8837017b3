"""Projection of conflicting gradients of the largest subnet and its children."""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from kdnas.distillers._wrapping import Wrapping
from kdnas.distillers.base import Batch, Model, Parallel, Step
from kdnas.distillers.sandwich import Sandwich
from kdnas.specs import Spec, spec

CHILDREN = ("smallest", "random")


@final
class ConflictFree(Wrapping):
    r"""If the largest subnet's gradient points against its children's, that component of it is removed.

    With $g$ the gradient of all losses before the first child's (the largest subnet's) and $c$ the sum of the
    children's, over all weights of the supernet at once: if $g \cdot c < 0$, then
    $g \leftarrow g - \frac{g \cdot c}{\lVert c \rVert^2} c$. The step takes $g + c$. Nothing changes if they agree,
    or if the children's gradient is zero. Costs one more copy of the gradient.

    Args:
        inner: a distiller whose children's losses are named `smallest` and `random`.

    Raises:
        ValueError: during training, if the inner distiller yields no child's loss.

    Reference: Gong et al., NASViT: Neural Architecture Search for Efficient Vision Transformers with Gradient
        Conflict-Aware Supernet Training, ICLR 2022, section 4.1.
    Differs: the paper's switchable scaling layers and weaker augmentation are left to space and data.
    """

    parallel: ClassVar[Parallel] = "any"
    reads_gradients: ClassVar[bool] = True

    def __init__(self, *, inner: Spec = spec(Sandwich)) -> None:
        super().__init__(inner)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The inner losses; after the last one the gradient is projected."""
        largest: dict[nn.Parameter, Tensor] | None = None
        for name, loss in self.inner.losses(model, batch, step):
            if largest is None and name in CHILDREN:
                largest = {}
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        largest[parameter], parameter.grad = parameter.grad, None
            yield name, loss
        if largest is None:
            raise ValueError(
                f"the inner distiller must yield a loss named {' or '.join(CHILDREN)}, but it yields none. "
                "Use a sandwich."
            )
        with torch.no_grad():
            project(largest, model)


def project(largest: dict[nn.Parameter, Tensor], model: nn.Module) -> None:
    """Add the largest subnet's projected gradient to that of the children, in the parameters' `grad`."""
    both = [(g, p.grad) for p, g in largest.items() if p.grad is not None]
    share = torch.zeros((), dtype=torch.float64)
    if both:
        dot = torch.stack([(g.double() * c.double()).sum() for g, c in both]).sum()
        square = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum()
        # A negative product implies a gradient that is not zero: the division is safe where it is used.
        share = torch.where(dot < 0, dot / torch.where(square > 0, square, 1.0), 0.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.sub_((share * parameter.grad).to(parameter.grad.dtype))
    for parameter, gradient in largest.items():
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
