"""How important the channels of a trained network are, and its supernet's channels in that order."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.conversion.channels import ChannelGroup, Place, groups_of
from kdnas.network import Network, image_batches
from kdnas.spaces.converted import Converted
from kdnas.supernet import Supernet

Importance = Callable[[Network, Sequence[ChannelGroup]], list[Tensor]]
_BLOCK = 64  # channels that are chosen between two updates of a fit's matrices


def channel_importance(
    network: Network,
    groups: Sequence[ChannelGroup],
    method: Literal["norm", "gradient", "activation", "reconstruction"] = "norm",
    images: Tensor | None = None,
    labels: Tensor | None = None,
) -> list[Tensor]:
    r"""The importance of every channel of each group, `[channels]`; larger is more important.

    - `norm`: the squared norm of the weights that compute (writers) or read (readers) channel c, each layer's relative
      to the mean over its channels: $\sum_l \|W_{l,c}\|^2 / \overline{\|W_l\|^2}$. It needs no images.
    - `gradient`: the mean over images of the squared derivative of the cross entropy by a factor of the channel, where
      layers read it, divided by the multiply-accumulates that the channel costs. It compares across groups too.
    - `activation`: the mean absolute value of the channel where layers read it.
    - `reconstruction`: the order in which channels are chosen one by one so that the least-squares fit of what all
      channels contribute to the layers that read them, by the channels chosen so far, gains most (greedy subset
      selection). With $R$ the covariance of a reader's input channels that is left when the chosen ones are
      regressed out, and $M = W W^\top$ the Gram matrix of its weights (kernel positions as further outputs), channel c
      gains $(R M R)_{cc} / R_{cc}$; of several readers, shares of their own total $\mathrm{tr}(M R_0)$ are added. The
      importance is the number of channels chosen later. Channels that say the same as others come last, which norms
      cannot see. Of concatenated groups each is fitted by itself.

    Args:
        network: the largest subnet, in evaluation mode.
        groups: not fixed, each with a reader.
        method: see above.
        images: `[batch, channels, height, width]`, normalised; for all methods but `norm`.
        labels: `[batch]`, for `gradient`; None takes the network's own predictions.

    Raises:
        ValueError: the method is unknown, or needs images and gets none.

    Reference: `norm`: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, group importance; `gradient`:
        Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021; `reconstruction`: the objective
        of He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1, and Luo et
        al., ThiNet, ICCV 2017, section 3.2.
    Differs: `norm` divides by each layer's mean, so that no layer outweighs the others, and leaves out batch norms.
        `reconstruction` adds channels greedily with the fit's exact gain, where the papers use the lasso and remove
        greedily without a fit; covariances are those of one position, kernel offsets apart.
    """
    if method == "norm":
        return [_norm(network, group) for group in groups]
    if method not in ("gradient", "activation", "reconstruction"):
        raise ValueError(f"the importance must be norm, gradient, activation or reconstruction, got {method!r}.")
    if images is None:
        raise ValueError(f"the importance {method} needs images, got none.")
    if method == "activation":
        with torch.no_grad():
            return _activation(network, groups, images)
    if method == "reconstruction":
        with torch.no_grad():
            return _reconstruction(network, groups, images)
    return _gradient(network, groups, images, labels)


def sort_by_importance(supernet: Supernet, importance: Importance = channel_importance) -> dict[str, Tensor]:
    """Sort a converted network's channels so that the leading ones of every group are the most important.

    Writers, normalisations and readers of a group are permuted alike; the largest subnet's outputs do not change,
    except for the order of floating point additions. Groups in front of a grouped convolution move by whole
    convolution groups. The optimizer's momentum is not permuted.

    Args:
        supernet: of a `Converted` space; its bank is sorted in place.
        importance: such as `channel_importance`, or a `functools.partial` of it with another method and images.

    Returns:
        By a group's key, the former number of each channel in the new order.
    """
    space = supernet.space
    assert isinstance(space, Converted)
    groups = [group for group in groups_of(space) if not group.fixed and group.writers and group.readers]
    layers = dict(space.blueprint(space.largest).named_layers())
    orders: dict[str, Tensor] = {}
    network = supernet.extract(space.largest).eval()
    for group, values in zip(groups, importance(network, groups), strict=True):
        blocks = values.unflatten(0, (-1, group.multiple)).sum(1).argsort(descending=True, stable=True)
        order = (blocks[:, None] * group.multiple + torch.arange(group.multiple, device=blocks.device)).flatten()
        orders[group.key] = order
        for places, dim in ((group.written(), 0), (group.read(), 1)):
            for (position, index), where in places:
                bank = supernet.bank_module(position, layers[position]).get_submodule(f"parts.{index}")
                _permute(bank, order, dim, where)
    return orders


@torch.no_grad()
def _permute(module: nn.Module, order: Tensor, dim: int, where: slice) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() > dim:
            own = tensor.narrow(dim, where.start, len(order))
            own.copy_(own.index_select(dim, order.to(tensor.device)))


def _module(network: Network, place: Place) -> nn.Module:
    position, index = place
    return network.get_submodule(f"{position}.parts.{index}")


def _weight(network: Network, place: Place) -> Tensor:
    return _module(network, place).get_parameter("weight").detach()


def _norm(network: Network, group: ChannelGroup) -> Tensor:
    writers = {*group.writers}
    weights = [_weight(network, place)[where] for place, where in group.written() if place in writers]
    weights += [_weight(network, place).transpose(0, 1)[where] for place, where in group.read()]
    squares = [weight.flatten(1).pow(2).sum(1) for weight in weights]
    return torch.stack([s / s.mean().clamp_min(torch.finfo(s.dtype).tiny) for s in squares]).sum(0)


def _activation(network: Network, groups: Sequence[ChannelGroup], images: Tensor) -> list[Tensor]:
    sums = [images.new_zeros(group.size) for group in groups]

    def observer(total: Tensor, where: slice) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add_(inputs[0][:, where].abs().transpose(0, 1).flatten(1).mean(1))

        return add

    readers = [(*use, total) for group, total in zip(groups, sums, strict=True) for use in group.read()]
    handles = [_module(network, p).register_forward_pre_hook(observer(total, where)) for p, where, total in readers]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return [total / len(group.readers) for group, total in zip(groups, sums, strict=True)]


def _reconstruction(network: Network, groups: Sequence[ChannelGroup], images: Tensor) -> list[Tensor]:
    places = list(dict.fromkeys(place for group in groups for place in group.readers))
    sums = {place: _Sums() for place in places}
    handles = [_module(network, place).register_forward_pre_hook(sums[place].observe) for place in places]
    try:
        for batch in image_batches(images):
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [_greedy(network, group, [sums[p].covariance()[w, w] for p, w in group.read()]) for group in groups]


class _Sums:
    """Sums over positions of a layer's input channels, and of their products."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def observe(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add a batch; a forward pre-hook."""
        values = inputs[0].transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.first = self.first.to(values) + values.sum(1)
        self.second = self.second.to(values) + values @ values.T

    def covariance(self) -> Tensor:
        """`[channels, channels]`."""
        mean = self.first / self.count
        return self.second / self.count - torch.outer(mean, mean)


def _greedy(network: Network, group: ChannelGroup, covariances: Sequence[Tensor]) -> Tensor:
    """The number of channels chosen after each one."""
    fits = []
    for (place, where), covariance in zip(group.read(), covariances, strict=True):
        weights = _weight(network, place).double().transpose(0, 1)[where].flatten(1)
        fits.append(_Fit(covariance, weights @ weights.T))
    importance = covariances[0].new_full((group.size,), -1.0)
    for rank in reversed(range(group.size)):
        gains = torch.stack([fit.gains() for fit in fits]).sum(0)
        chosen = int(torch.where(importance < 0, gains, -1.0).argmax())
        importance[chosen] = rank
        for fit in fits:
            fit.choose(chosen)
    return importance


class _Fit:
    r"""The least-squares fit of a reader's inputs by the channels chosen so far.

    Choosing channel c takes $R \leftarrow R - r r^\top / \rho$ with r its column and $\rho = R_{cc}$, and with it
    $G = R M R \leftarrow G - (s r^\top + r s^\top) / \rho$ with $s = G_{:c} - \tfrac{G_{cc}}{2 \rho} r$. The diagonals
    are kept up to date; R and G themselves are after every `_BLOCK` channels, by products of matrices, and columns in
    between are computed from the last R and G. Updates channel by channel would read and write both each time.

    Args:
        covariance: R before any is chosen, `[channels, channels]`, float64.
        gram: M, `[channels, channels]`.
    """

    def __init__(self, covariance: Tensor, gram: Tensor) -> None:
        tiny = torch.finfo(covariance.dtype).tiny
        self.total = max(float((gram * covariance).sum()), tiny)
        # What is chosen, or constant, leaves a variance of rounding errors, which must gain nothing.
        self.floor = max(1e-6 * float(covariance.diagonal().mean()), tiny)
        self.rest, self.gain = covariance.clone(), covariance @ gram @ covariance
        self.rest_left, self.gain_left = self.rest.diagonal().clone(), self.gain.diagonal().clone()
        self.rows, self.shifts = covariance.new_empty(2, _BLOCK, len(covariance))  # r and s over sqrt(rho)
        self.count = 0  # of channels chosen since R and G were updated

    def gains(self) -> Tensor:
        """What each channel would gain, a share of the total, `[channels]`."""
        return self.gain_left.clamp_min(0) / (self.rest_left.clamp_min(0) + self.floor) / self.total

    def choose(self, channel: int) -> None:
        """Regress a channel out of all others."""
        if self.count == _BLOCK:
            self.rest -= self.rows.T @ self.rows
            both = self.rows.T @ self.shifts
            self.gain -= both + both.T
            self.count = 0
        rows, shifts = self.rows[: self.count], self.shifts[: self.count]
        own, shift = rows[:, channel], shifts[:, channel]
        row = self.rest[channel] - own @ rows
        column = self.gain[channel] - shift @ rows - own @ shifts
        rho = float(row[channel]) + self.floor
        shift = column - float(column[channel]) / (2 * rho) * row
        self.rows[self.count], self.shifts[self.count] = row / rho**0.5, shift / rho**0.5
        self.rest_left -= row.square() / rho
        self.gain_left -= 2 * shift * row / rho
        self.count += 1


def _gradient(network: Network, groups: Sequence[ChannelGroup], images: Tensor, labels: Tensor | None) -> list[Tensor]:
    factors = [images.new_ones(len(images), group.size).requires_grad_() for group in groups]
    macs = [0.0] * len(groups)
    handles = []

    def scale(factor: Tensor, where: slice) -> Callable[..., tuple[Tensor]]:
        def own(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            shaped = factor.reshape(*factor.shape, *[1] * (inputs[0].dim() - 2))
            if factor.shape[1] == inputs[0].shape[1]:
                return (inputs[0] * shaped,)
            before, after = inputs[0][:, : where.start], inputs[0][:, where.stop :]
            return (torch.cat([before, inputs[0][:, where] * shaped, after], 1),)

        return own

    def count(index: int, dim: int) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.get_parameter("weight")
            macs[index] += weight.numel() / weight.shape[dim] * output.shape[2:].numel()

        return add

    for index, group in enumerate(groups):
        for place, where in group.read():
            handles.append(_module(network, place).register_forward_pre_hook(scale(factors[index], where)))
        for places, dim in ((group.writers, 0), (group.readers, 1)):
            handles += [_module(network, place).register_forward_hook(count(index, dim)) for place in places]
    try:
        logits = network(images).logits
    finally:
        for handle in handles:
            handle.remove()
    loss = F.cross_entropy(logits, logits.argmax(1) if labels is None else labels, reduction="sum")
    gradients = torch.autograd.grad(loss, factors)
    return [gradient.pow(2).mean(0) / cost for gradient, cost in zip(gradients, macs, strict=True)]
