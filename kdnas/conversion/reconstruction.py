"""What remains of a network after a removal, with the weights that reconstruct its layers by least squares."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.conversion.channels import Place, operations
from kdnas.conversion.removal import Masks, Removal, counts_of, joined
from kdnas.network import Network, image_batches
from kdnas.randomness import torch_rng

_RIDGE = 1e-3  # of the mean variance of the remaining inputs
_POSITIONS = 40_000  # samples per layer: enough for a covariance of some thousand inputs


class _Inputs(NamedTuple):
    """What is fitted to: of a layer's inputs, k = channels times kernel positions, and of its outputs.

    Attributes:
        mean: of the inputs, `[k]`.
        covariance: of the inputs, `[k, k]`.
        cross: covariance of inputs and outputs, `[k, outputs]`.
    """

    mean: Tensor
    covariance: Tensor
    cross: Tensor


@final
class Reconstruction:
    r"""Removes channels from a network and fits the layers that read them, in closed form.

    A layer $y = W x$ whose inputs $S$ remain gets the weights that reproduce its outputs best on the images, ridge
    regression towards its own weights:

    $W' = W C_{:S} (C_{SS} + \epsilon I)^{-1} + \epsilon W_S (C_{SS} + \epsilon I)^{-1}$

    with $C$ the covariance of its inputs in the whole network and $\epsilon$ a thousandth of the mean variance of
    $x_S$. A bias takes up what the means of the removed inputs contributed; of layers without one the batch norm does,
    whose statistics must be estimated again (`kdnas.network.calibrate`). Nothing is trained. Inputs of convolutions
    are the patches of their kernels. Depthwise and grouped convolutions keep their own weights.

    Args:
        removal: of the network's space and units.
        network: the whole network.
        images: `[batch, channels, height, width]`, normalised, on the network's device.
        positions: samples per layer, drawn from all images and output positions.

    Reference: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, equation 2.
    Differs: every layer is fitted to its inputs in the whole network instead of those that the layers before it leave,
        so that one pass over the images serves every removal; a ridge.
    """

    def __init__(self, removal: Removal, network: Network, images: Tensor, positions: int = _POSITIONS) -> None:
        self.removal, self.source = removal, network
        self.state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        places = [place for place in removal.readers if operations(removal.space)[place[0]][place[1]].mixes]
        samples: dict[Place, list[Tensor]] = {place: [] for place in places}
        batches = image_batches(images)
        handles = [
            network.get_submodule(f"{position}.parts.{index}").register_forward_pre_hook(
                _observer(samples[position, index], positions // len(batches))
            )
            for position, index in places
        ]
        try:
            with torch.no_grad():
                for batch in batches:
                    network(batch)
        finally:
            for handle in handles:
                handle.remove()
        self._inputs = {place: _statistics(samples.pop(place), self._weight(place)) for place in places}

    def network(self, masks: Masks) -> Network:
        """The network that the masks leave, fitted."""
        left = self.removal.network(self.state, masks)
        gone = self.removal.gone(counts_of(masks))
        with torch.no_grad():
            for (position, index), inputs in self._inputs.items():
                runs = self.removal.readers[position, index]
                if position not in gone and not all(bool(masks[key].all()) for key, _ in runs):
                    mask = joined(runs, masks, self._weight((position, index)).shape[1]).to(inputs.mean.device)
                    module = left.get_submodule(f"{position}.parts.{index}")
                    self._fit(module, (position, index), inputs, mask, masks)
        return left

    def _fit(self, module: nn.Module, place: Place, inputs: _Inputs, mask: Tensor, masks: Masks) -> None:
        weight = self._weight(place)
        whole, cross = weight.flatten(1).to(inputs.mean.dtype), inputs.cross
        if place in self.removal.outputs:
            outputs = joined(self.removal.outputs[place], masks, len(whole)).to(whole.device)
            whole, cross = whole[outputs], cross[:, outputs]
        remaining = mask.repeat_interleave(whole.shape[1] // len(mask))
        square = inputs.covariance[remaining][:, remaining]
        ridge = _RIDGE * square.diagonal().mean().clamp_min(torch.finfo(square.dtype).tiny)
        square.diagonal().add_(ridge)
        fitted = _solved(square, cross[remaining] + ridge * whole[:, remaining].T).T
        module.get_parameter("weight").copy_(fitted.reshape(module.get_parameter("weight").shape))
        if getattr(module, "bias", None) is not None:
            change = whole @ inputs.mean - fitted @ inputs.mean[remaining]
            module.get_parameter("bias").add_(change.to(weight.dtype))

    def _weight(self, place: Place) -> Tensor:
        return self.state["{}.parts.{}.weight".format(*place)]


def _solved(square: Tensor, right: Tensor) -> Tensor:
    """`square^-1 right` of a symmetric matrix, which is positive definite up to rounding."""
    factor, failed = torch.linalg.cholesky_ex(square)  # half of the operations of an elimination
    return torch.linalg.solve(square, right) if failed else torch.cholesky_solve(right, factor)


def _observer(samples: list[Tensor], count: int) -> Callable[..., None]:
    def measure(module: nn.Module, arguments: Sequence[Tensor]) -> None:
        samples.append(_samples(module, arguments[0], count, len(samples)))

    return measure


def _statistics(samples: Sequence[Tensor], weight: Tensor) -> _Inputs:
    values = torch.cat(list(samples)).float()
    mean = values.double().mean(0)
    values -= mean.float()
    # Of centred values, so that single precision is far below the ridge; in double it takes most of a pruning's start.
    covariance = values.T @ values / len(values)
    return _Inputs(mean.float(), covariance, covariance @ weight.flatten(1).T.to(covariance))


def _samples(module: nn.Module, x: Tensor, count: int, batch: int) -> Tensor:
    """What a layer reads for some of its outputs: `[samples, inputs times kernel positions]`."""
    rng = torch_rng("reconstruction", batch)
    if not isinstance(module, nn.Conv2d):
        x = x.flatten(0, -2)
        return x[torch.randperm(len(x), generator=rng)[:count].to(x.device)]
    (high, wide), (down, right), (up, along) = module.kernel_size, module.stride, module.dilation
    vertical, horizontal = module.padding
    assert isinstance(vertical, int) and isinstance(horizontal, int)
    x = F.pad(x, (horizontal, horizontal, vertical, vertical))
    height = (x.shape[2] - up * (high - 1) - 1) // down + 1
    width = (x.shape[3] - along * (wide - 1) - 1) // right + 1
    chosen = torch.randperm(len(x) * height * width, generator=rng)[:count].to(x.device)
    image, row, column = chosen // (height * width), chosen // width % height * down, chosen % width * right
    patches = [x[image, :, row + up * i, column + along * j] for i in range(high) for j in range(wide)]
    return torch.stack(patches, 2).flatten(1)
