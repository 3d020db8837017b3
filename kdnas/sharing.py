"""Additions of Once-for-All to the leading corner: transformed kernels, and channels sorted by importance."""

import itertools
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from kdnas.architecture import Architecture
from kdnas.blocks.basic import ConvNormAct
from kdnas.blocks.mbconv import MBConv, SqueezeExcite
from kdnas.blocks.resnet import BasicBlock, Bottleneck
from kdnas.supernet import Supernet, corner


@final
class KernelTransform(nn.Module):
    r"""A sharing rule in which a smaller depthwise kernel is a learned linear map of the next larger one's centre.

    $\mathrm{vec}(W_{k-2}) = M_{k \to k-2} \mathrm{vec}(\mathrm{centre}_{k-2}(W_k))$, applied from the bank's size down
    to the subnet's, so that the 3x3 kernel of a 7x7 bank is mapped twice. One matrix per layer and size, shared by
    the layer's channels; $(k-2)^2 \times (k-2)^2$, initially the identity, for which this equals `corner`. All other
    tensors are cut as by `corner`. The matrices belong to the supernet, are trained and checkpointed with it; a student
    receives the mapped kernels.

    Raises:
        ValueError: at `prepare`, if two banks at one position have depthwise kernels: they are operations with
            weights of their own, whose kernels are never cut.

    Reference: Cai, Gan, Wang, Zhang, Han, Once-for-All, ICLR 2020, section 3.3, elastic kernel size.
    Differs: the steps are of two, whatever the options; the released code steps from option to option, which is the
        same for 3, 5, 7. Weight decay acts on the matrices, as in the released code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterDict()

    def prepare(self, bank: nn.ModuleDict) -> None:
        """Create the matrices of every depthwise kernel of the bank that can be cut."""
        for key, module in bank.items():
            position = key.partition(":")[0]
            for path, conv in module.named_modules():
                if not isinstance(conv, nn.Conv2d) or conv.groups == 1 or conv.weight.shape[1] != 1:
                    continue
                for size in range(conv.weight.shape[2], 3, -2):
                    name = _matrix(f"{position}.{path}.weight", size)
                    if name in self.matrices:
                        raise ValueError(
                            f"two banks at {position} have depthwise kernels, so their kernels are never cut. "
                            "Remove KernelTransform from this run."
                        )
                    self.matrices[name] = nn.Parameter(torch.eye((size - 2) ** 2))

    def forward(self, name: str, weight: Tensor, shape: torch.Size) -> Tensor:
        """The subnet's tensor; see `Share`."""
        if weight.dim() != 4 or weight.shape[2] == shape[2] or _matrix(name, weight.shape[2]) not in self.matrices:
            return corner(name, weight, shape)
        kernel = corner(name, weight, torch.Size((*shape[:2], *weight.shape[2:])))
        for size in range(weight.shape[2], shape[2], -2):
            centre = kernel[:, :, 1:-1, 1:-1]
            kernel = (centre.flatten(1) @ self.matrices[_matrix(name, size)].T).view(centre.shape)
        return kernel


def _matrix(name: str, size: int) -> str:
    return f"{name}:{size}".replace(".", "_")


@torch.no_grad()
def sort_channels(supernet: Supernet, nested: Iterable[Architecture] = ()) -> None:
    """Sort the channels inside every block of the bank, so that the leading ones are the most important.

    A channel's importance is the sum of the absolute weights with which the block's last convolution reads it. All
    layers of the channel (convolution, batch norm, depthwise convolution, squeeze and excite) are permuted with it, and
    the units inside squeeze and excite by the weights that read them: the outputs of the largest subnet do not change,
    except for the order of floating point additions. Blocks without inner channels, and the channels between blocks,
    stay as they are. The optimiser's momentum is not permuted: reset it.

    Args:
        supernet: its bank is sorted in place.
        nested: subnets that are trained already. No channel moves into or out of their part of a block, so that
            their outputs do not change.

    Reference: Cai et al., Once-for-All, ICLR 2020, section 3.3, elastic width (channel sorting).
    Differs: the released code adds an offset of -1e5 per nested width to the importances; sorting inside the
        nested ranges is the same.
    """
    widths = _nested(supernet, nested)
    for module in supernet.bank.modules():
        inner, units = widths.get(id(module), (set(), set()))
        if isinstance(module, MBConv):
            if isinstance(module.squeeze, SqueezeExcite):
                _sort([(module.squeeze.reduce, "out")], [(module.squeeze.expand, "in")], units)
            if isinstance(module.expand, ConvNormAct):
                writers: list[tuple[nn.Module, str]] = [(m, "out") for m in (*module.expand, *module.depthwise)]
                if isinstance(module.squeeze, SqueezeExcite):
                    writers += [(module.squeeze.reduce, "in"), (module.squeeze.expand, "out")]
                _sort(writers, [(module.reduce[0], "in")], inner)
        elif isinstance(module, BasicBlock | Bottleneck):
            for first, second in itertools.pairwise(module.branch.children()):
                _sort([(m, "out") for m in first.children()], [(second.get_submodule("0"), "in")], inner)


def _nested(supernet: Supernet, nested: Iterable[Architecture]) -> dict[int, tuple[set[int], set[int]]]:
    """For each block of the bank, by id, the numbers of inner channels and of squeezed units that the subnets use."""
    widths: dict[int, tuple[set[int], set[int]]] = {}
    for architecture in nested:
        for name, layer in supernet.space.blueprint(architecture).named_layers():
            arguments = dict(layer.make.arguments)
            inner, units = widths.setdefault(id(supernet.bank_module(name, layer)), (set(), set()))
            # A ResNet block without an argument for the inner width has as many inner channels as outputs.
            inner.add(arguments.get("expanded", arguments.get("hidden") or arguments.get("outputs", 0)))
            units.add(arguments.get("squeezed", 0))
    return widths


def _sort(writers: list[tuple[nn.Module, str]], readers: list[tuple[nn.Module, str]], edges: set[int]) -> None:
    """Permute the writers and readers of some channels by falling importance, within the ranges between `edges`."""
    weight = readers[0][0].get_parameter("weight")
    importance = weight.abs().flatten(2).sum((0, 2)) if weight.dim() > 2 else weight.abs().sum(0)
    cuts = sorted({0, len(importance), *(edge for edge in edges if edge < len(importance))})
    order = torch.cat(
        [start + importance[start:end].argsort(descending=True, stable=True) for start, end in itertools.pairwise(cuts)]
    )
    for module, side in (*writers, *readers):
        for tensor in (*module.parameters(), *module.buffers()):
            # A depthwise kernel's channels are its outputs; a bias has outputs only.
            if side == "out" and tensor.dim() > 0:
                tensor.copy_(tensor[order])
            elif side == "in" and tensor.dim() > 1:
                tensor.copy_(tensor[:, order])
