"""A pairwise ranking loss between sampled subnets, ordered by a cheap prior."""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.costs.count import cost
from kdnas.distillers._wrapping import Wrapping
from kdnas.distillers.base import Batch, Model, Parallel, Step
from kdnas.distillers.sandwich import Sandwich
from kdnas.ranks.tensors import mean
from kdnas.specs import Spec, spec
from kdnas.supernet import Supernet


@final
class Ranked(Wrapping):
    r"""Of two random subnets, the one with more multiply-accumulates should have the lower loss.

    With subnets $a, b$ sampled uniformly and ordered so that $\mathrm{macs}(a) < \mathrm{macs}(b)$, and $L$ the
    cross-entropy with the labels (a mean over the batch), a further loss is
    $w \cdot \max(0, L_b - \mathrm{sg}(L_a))$, where $w$ rises linearly from 0 to `weight` over the share `ramp` of the
    steps. $a$ is run without gradient and leaves the batch-norm buffers unchanged. For two subnets of equal cost
    no loss is yielded. Costs two forward passes and one backward.

    Args:
        inner: the distiller to which the ranking loss is added.
        weight: the final $w$.
        ramp: share of the steps after which $w$ is final.

    Raises:
        ValueError: a negative weight, or a ramp outside (0, 1].

    Reference: Dong et al., RD-NAS: Enhancing One-Shot Supernet Ranking Ability via Ranking Distillation from Zero-Cost
        Proxies, ICASSP 2023, the margin ranking loss.
    Differs: the prior is the number of multiply-accumulates; the paper's weight is min(2, epoch / 10), ours rises over
        a share of the steps, since a step knows no epochs.
    """

    parallel: ClassVar[Parallel] = "same"

    def __init__(self, *, inner: Spec = spec(Sandwich), weight: float = 2.0, ramp: float = 0.2) -> None:
        super().__init__(inner)
        if weight < 0:
            raise ValueError(f"`weight` must not be negative, got {weight}.")
        if not 0 < ramp <= 1:
            raise ValueError(f"`ramp` must be a share of the steps in (0, 1], got {ramp}.")
        self.weight, self.ramp = weight, ramp

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The inner losses, then the ranking loss."""
        yield from self.inner.losses(model, batch, step)
        assert isinstance(model, Supernet)
        space, rng = model.space, step.rng("ranked")
        pair = [space.sample(rng) for _ in range(2)]
        macs = [cost(space.blueprint(architecture)).macs for architecture in pair]
        if macs[0] == macs[1]:
            return
        cheap, expensive = pair if macs[0] < macs[1] else pair[::-1]
        with torch.no_grad():
            logits = model(batch.images, cheap, regularise=False, batch_statistics=True).logits
            bound = batch.task.loss(logits.float(), batch.labels)
        loss = batch.task.loss(model(batch.images, expensive, regularise=False).logits.float(), batch.labels)
        yield "rank", self.weight * min(1.0, step.progress / self.ramp) * mean(loss - bound).clamp_min(0)
