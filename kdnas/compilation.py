"""Layers as programs of `torch.compile` inside of a training's steps."""

import importlib.util
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import nn

_BACKEND: ContextVar[Any] = ContextVar("backend", default=None)
_UNLIMITED = 2**30
# Of weights that are slices of others PyTorch warns as it compiles, of its own look at them.
_MESSAGE = r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"
_OF_GRADIENTS = ("ignore", re.compile(_MESSAGE, re.IGNORECASE), Warning, None, 0)
_FUNCTIONS: dict[tuple[Callable[..., Any], Any], Callable[..., Any]] = {}


@contextmanager
def compiling(enabled: bool = True, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Inside, networks, supernets and teachers run compiled layers in place of their own Python code.

    A layer is compiled when it is first called, for the forward pass and, with a graph, for the backward pass. Other
    calls of layers of the same class, options, mode, and shapes and memory formats of inputs and weights use the same
    program, in whatever network or subnet they are: the layer's weights are inputs of the program. Random numbers are
    those of the layer's own code. No module is changed, nor any key of its state.

    Args:
        enabled: False changes nothing.
        backend: of `torch.compile`.

    Raises:
        ValueError: a layer cannot be compiled.

    Example:
        >>> from kdnas.network import Network
        >>> from kdnas.tables import load_space
        >>> space = load_space("toy")
        >>> network, images = Network(space.blueprint(space.smallest)).eval(), torch.rand(2, 3, 8, 8)
        >>> with compiling(backend="eager"), torch.no_grad():
        ...     logits = network(images).logits
        >>> torch.allclose(logits, network(images).logits, atol=1e-5)
        True
    """
    if not enabled:
        yield
        return
    import torch._inductor.config as inductor  # takes seconds
    from torch._dynamo.exc import TorchDynamoException

    if _OF_GRADIENTS not in warnings.filters:  # as `catch_warnings` in every step would show others in every step
        warnings.filterwarnings("ignore", _MESSAGE)
    token = _BACKEND.set(backend)
    try:
        with any_number(), inductor.patch(fallback_random=True):
            yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
        raise ValueError(f"a layer cannot be compiled ({reason}). Train with `execution` eager.") from error
    finally:
        _BACKEND.reset(token)


def is_compiling() -> bool:
    """Whether layers run as programs."""
    return _BACKEND.get() is not None


@contextmanager
def any_number() -> Iterator[None]:
    """Inside, PyTorch compiles functions of the same code any number of times.

    Otherwise it leaves all beyond the eighth uncompiled, without an error.
    """
    import torch._dynamo.config as dynamo  # takes seconds

    with dynamo.patch(recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED):
        yield


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Inside of `compiling`, calls of this module run the compiled code of its parts.

    A part is the module itself, if no hook is on a module within it, or the largest of its submodules of which this
    holds: hooks see the outputs that they see otherwise. Plain sequences are taken apart, so that their equal blocks
    share a program. Single layers of PyTorch outside of a part run as they are.
    """
    backend = _BACKEND.get()
    parts = () if backend is None else _parts(module)
    with forwards({part: _function(type(part).forward, backend) for part in parts}):
        yield


@contextmanager
def forwards(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each of these modules computes by a function of the module and its inputs in place of its `forward`.

    The modules have no `forward` of their own, beside that of their class, before and afterwards.
    """
    for module, function in functions.items():
        vars(module)["forward"] = MethodType(function, module)
    try:
        yield
    finally:
        for module in functions:
            del vars(module)["forward"]


def check_compiler(device: torch.device) -> None:
    """Raise a ValueError where what `torch.compile` needs for a device is not installed."""
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        lacks = [] if importlib.util.find_spec("triton") else ["Triton"]
    else:
        names = [os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
        lacks = []
    lacks += [] if any(map(shutil.which, names)) else [f"a compiler, {' or '.join(names)}"]
    if lacks:
        raise ValueError(
            f"`execution` must be eager on this machine, got compiled: torch.compile needs {' and '.join(lacks)} for "
            f"the device {device.type}. Install it, or train with `execution` eager."
        )


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    if not children or isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return
    is_sequence = type(module) is nn.Sequential and any(any(child.children()) for child in children)
    is_watched = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module)
    if is_sequence or is_watched or type(module).forward is nn.Module.forward:
        for child in children:
            yield from _parts(child)
    else:
        yield module


def _function(forward: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """The compiled form of a class's `forward`; its programs are PyTorch's to find."""
    key = forward, backend
    if key not in _FUNCTIONS:
        _FUNCTIONS[key] = torch.compile(forward, dynamic=False, backend=backend)
    return _FUNCTIONS[key]
