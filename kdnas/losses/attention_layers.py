"""Attention maps of networks that were not written to show them: torchvision's, timm's, transformers' and others'."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.network import hooked


@contextmanager
def called_attention(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Inside, calls of these modules enter their attention maps into the dictionary, in order of execution.

    `nn.MultiheadAttention` and timm's modules compute the maps explicitly meanwhile; of another module the output is
    entered, of a tuple the last entry.
    """
    maps: dict[nn.Module, Any] = {}
    with ExitStack() as stack:
        for module in modules:
            drop = getattr(module, "attn_drop", None)
            if isinstance(module, nn.MultiheadAttention):
                stack.callback(module.register_forward_pre_hook(_with_weights, with_kwargs=True).remove)
            if isinstance(drop, nn.Module) and isinstance(module.__dict__.get("fused_attn"), bool):
                # timm's: the dropout is called with the map, unless all is one fused operation.
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False  # type: ignore[assignment]
                stack.enter_context(hooked([drop], after=partial(_enter_input, maps, module)))
            else:
                stack.enter_context(hooked([module], after=partial(_enter_output, maps)))
        yield maps


def _with_weights(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    bound = signature(module.forward).bind(*arguments, **options).arguments
    return (), {**bound, "need_weights": True, "average_attn_weights": False}


def _enter_input(maps: dict[nn.Module, Any], owner: nn.Module, _: Any, inputs: tuple[Any, ...], __: Any) -> None:
    maps[owner] = inputs[0]


def _enter_output(maps: dict[nn.Module, Any], module: nn.Module, _: Any, output: Any) -> None:
    maps[module] = output[-1] if isinstance(output, tuple) and output else output


def find_attention(module: nn.Module, images: Tensor) -> tuple[str, ...]:
    """The names of a network's attention layers, in order of execution; empty where it shows no maps.

    These are the submodules whose map, as `called_attention` gives it, is `[batch, heads, tokens, tokens]` with rows
    that sum to 1; of modules with the same map the innermost. Attention within windows has a map per window, attention
    between channels one of channels, and both count as none. Networks of transformers compute their maps explicitly
    from this call on.

    Args:
        module: the network, in evaluation mode.
        images: `[batch, channels, height, width]`, at least two, as the network takes them.
    """
    for part in module.modules():
        explicit = getattr(part, "set_attn_implementation", None)
        if callable(explicit):
            explicit("eager")
            break
    parts = {part: name for name, part in module.named_modules() if name}
    shapes: dict[str, torch.Size] = {}

    def keep_shape(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            shapes[parts[part]] = inputs[0].shape

    with called_attention(list(parts)) as maps, hooked(parts, before=keep_shape), torch.no_grad():
        module(images)
    chosen: dict[int, str] = {}
    for part, value in maps.items():
        if _is_map(value, len(images)) and _is_over_positions(parts[part], value.shape, shapes):
            chosen.setdefault(value.data_ptr(), parts[part])
    return tuple(chosen.values())


def _is_over_positions(name: str, shape: torch.Size, inputs: Mapping[str, torch.Size]) -> bool:
    """Whether a map of this shape is between the positions of a layer's input, which is tokens or a map.

    A softmax or dropout gets the map itself; the module around it then tells.
    """
    while name and inputs.get(name, shape) == shape:
        name = name.rpartition(".")[0]
    own = inputs.get(name, torch.Size())
    if len(own) == 4:
        return shape[2] in (own[1] * own[2], own[2] * own[3])
    return len(own) != 3 or shape[2] in own[:2]


def _is_map(value: Any, batch: int) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return False
    if len(value) != batch or value.shape[2] != value.shape[3] or value.shape[2] < 2:
        return False
    sums = value.float().sum(3)
    return bool((value >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
