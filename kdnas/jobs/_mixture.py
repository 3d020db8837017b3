"""Several networks as one student: its blueprint, its weights, and the fitting of the mixture."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.network import Network
from kdnas.space import Blueprint, layer
from kdnas.specs import Spec, spec


def mixture_blueprint(members: Sequence[Blueprint], image: tuple[int, int, int]) -> Blueprint:
    """One network of several: its stem gives every member's logits, its head their weighted sum; it has no stages.

    Args:
        members: at least one; each resizes the images to its own size.
        image: channels, height and width of the images.
    """
    stem = layer("kdnas.blocks.mixture:Members", members=tuple(_member(member) for member in members))
    return Blueprint(stem, (), layer("kdnas.blocks.mixture:Mixture", count=len(members)), image)


def _member(member: Blueprint) -> Spec:
    _, height, width = member.image
    return spec("kdnas.blocks.mixture:Member", height=height, width=width, **dict(member.chain.make.arguments))


def mixture(members: Sequence[Network], weights: Tensor, image: tuple[int, int, int]) -> Network:
    """The members as one network, with copies of their weights; logits are `sum_k weights[k] * logits_k`."""
    blueprint = mixture_blueprint([member.blueprint for member in members], image)
    with torch.random.fork_rng(devices=[]):
        network = Network(blueprint)
    state = {"head.weights": weights.float()}
    for index, member in enumerate(members):
        modules = [member.stem, *(block for stage in member.stages for block in stage.children()), member.head]
        for place, module in enumerate(modules):
            state |= {f"stem.members.{index}.{place}.{name}": t for name, t in module.state_dict().items()}
    network.load_state_dict(state)
    return network.eval()


def fitted_weights(logits: Tensor, labels: Tensor, steps: int = 300) -> Tensor:
    r"""Mixture weights $w_k \ge 0$, $\sum_k w_k = 1$, that lower the cross-entropy of $\sum_k w_k z_k$.

    Exponentiated gradient from equal weights, with a step that is halved until the loss does not rise: it never ends
    above that of equal weights, and the problem is convex.

    Args:
        logits: $z$, `[members, images, classes]`.
        labels: `[images]`.
        steps: at most.

    Returns:
        The weights, `[members]`, float32.

    Raises:
        ValueError: no members or no images.

    Reference: Macko et al., Improving Neural Architecture Search Image Classifiers via Ensemble Learning, 2019,
        section 3 (mixture weights learnt with the members frozen); Kivinen and Warmuth, Exponentiated Gradient versus
        Gradient Descent, 1997.
    Differs: the weights are a convex combination, so that the scale of the logits, by which the ensemble teaches,
        stays that of its members; AdaNet's are free and regularised.
    """
    if logits.dim() != 3 or not logits.numel():
        raise ValueError(
            f"`logits` must be [members, images, classes] with at least one of each, got {tuple(logits.shape)}."
        )
    logits = logits.detach().double()
    weights = torch.full((len(logits),), 1 / len(logits), dtype=torch.float64, device=logits.device)

    def value(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.einsum("k,kbc->bc", w, logits), labels)

    best, rate = value(weights), 1.0
    for _ in range(steps):
        w = weights.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(w), w)
        while rate > 1e-12:
            candidate = (weights.log() - rate * gradient).softmax(0)
            loss = value(candidate)
            if loss <= best:
                break
            rate /= 2
        else:
            break
        done = bool(best - loss <= 1e-12 * best.abs())
        weights, best, rate = candidate, loss, 2 * rate
        if done:
            break
    return weights.float()
