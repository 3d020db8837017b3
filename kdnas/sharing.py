"""Once-for-all's two additions to the leading corner: transformed kernels, and channels sorted by importance."""

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
    to the wanted one, so that the 3x3 kernel of a 7x7 bank is mapped twice. One matrix per layer and step, shared by
    the layer's channels; $(k-2)^2 \times (k-2)^2$, the identity at first: then this is `corner`, exactly. Everything
    but depthwise kernels is cut as `corner` cuts it. The matrices are the supernet's, trained and checkpointed with
    it; a student receives the mapped kernels.

    Raises:
        ValueError: at `prepare`, when two banks at one position have depthwise kernels: they are operations with
            weights of their own, whose kernels are never cut.

    Reference: Cai, Gan, Wang, Zhang, Han, Once-for-All, ICLR 2020, section 3.3, elastic kernel size.
    Differs: the steps are of two, whatever the options; the released code steps from option to option, which is the
        same for 3, 5, 7. Weight decay acts on the matrices, as in the released code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterDict()

    def prepare(self, bank: nn.ModuleDict) -> None:
        """Make the matrices for every depthwise kernel of the bank that can be cut."""
        for key, module in bank.items():
            position = key.partition(":")[0]
            for path, held in module.named_modules():
                if not isinstance(held, nn.Conv2d) or held.groups == 1 or held.weight.shape[1] != 1:
                    continue
                for size in range(held.weight.shape[2], 3, -2):
                    name = _matrix(f"{position}.{path}.weight", size)
                    if name in self.matrices:
                        raise ValueError(
                            f"two banks at {position} have depthwise kernels, so their kernels are never cut. "
                            "Leave KernelTransform out for this space."
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

    A channel's importance is the sum of the absolute weights with which the block's last convolution reads it. What
    makes the channel (convolution, batch norm, depthwise convolution, squeeze and excite) moves with it, and so do
    the units inside squeeze and excite, by the weights that read them: no output of the largest subnet changes, but
    for the order in which floating point adds. Blocks without inner channels of their own, and the channels between
    blocks, stay as they are. The optimiser's momentum is not moved: start it anew.

    Args:
        supernet: whose bank is sorted, in place.
        nested: subnets that are trained already. No channel moves into or out of their part of a block, so that
            each computes what it did.

    Reference: Cai et al., Once-for-All, ICLR 2020, section 3.3, elastic width (channel sorting).
    Differs: the released code adds an offset of -1e5 per nested width to the importances; sorting inside the
        nested ranges is the same.
    """
    kept = _nested(supernet, nested)
    for module in supernet.bank.modules():
        if isinstance(module, MBConv):
            if isinstance(module.squeeze, SqueezeExcite):
                squeeze = module.squeeze
                _sort([(squeeze.reduce, "out")], [(squeeze.expand, "in")], kept.get(id(module), {}).get("units", set()))
            if isinstance(module.expand, ConvNormAct):
                made: list[tuple[nn.Module, str]] = [(m, "out") for m in (*module.expand, *module.depthwise)]
                if isinstance(module.squeeze, SqueezeExcite):
                    made += [(module.squeeze.reduce, "in"), (module.squeeze.expand, "out")]
                _sort(made, [(module.reduce[0], "in")], kept.get(id(module), {}).get("inner", set()))
        elif isinstance(module, BasicBlock | Bottleneck):
            for first, second in itertools.pairwise(module.branch.children()):
                _sort(
                    [(m, "out") for m in first.children()],
                    [(second.get_submodule("0"), "in")],
                    kept.get(id(module), {}).get("inner", set()),
                )


def _nested(supernet: Supernet, nested: Iterable[Architecture]) -> dict[int, dict[str, set[int]]]:
    """For each block of the bank, how many of its inner channels and squeezed units the subnets use."""
    found: dict[int, dict[str, set[int]]] = {}
    for architecture in nested:
        for name, one in supernet.space.blueprint(architecture).named_layers():
            held = supernet.bank_module(name, one)
            arguments = dict(one.make.arguments)
            used = found.setdefault(id(held), {"inner": set(), "units": set()})
            # A ResNet block whose arguments name no inner width has as many as it gives.
            used["inner"].add(arguments.get("expanded", arguments.get("hidden") or arguments.get("outputs", 0)))
            used["units"].add(arguments.get("squeezed", 0))
    return found


def _sort(made: list[tuple[nn.Module, str]], readers: list[tuple[nn.Module, str]], edges: set[int]) -> None:
    """Permute what makes some channels, and what reads them, by falling importance within the ranges of `edges`."""
    weight = readers[0][0].get_parameter("weight")
    importance = weight.abs().flatten(2).sum((0, 2)) if weight.dim() > 2 else weight.abs().sum(0)
    cuts = sorted({0, len(importance), *(edge for edge in edges if edge < len(importance))})
    order = torch.cat(
        [start + importance[start:end].argsort(descending=True, stable=True) for start, end in itertools.pairwise(cuts)]
    )
    for module, side in (*made, *readers):
        for tensor in (*module.parameters(), *module.buffers()):
            # A depthwise kernel's channels are its outputs; a bias has outputs only.
            if side == "out" and tensor.dim() > 0:
                tensor.copy_(tensor[order])
            elif side == "in" and tensor.dim() > 1:
                tensor.copy_(tensor[:, order])
