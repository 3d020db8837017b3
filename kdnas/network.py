"""A blueprint as an ordinary PyTorch network."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdnas.blocks.basic import AttentionMap, ClassifiedMap, enlarge, resize
from kdnas.compilation import compiled
from kdnas.depthwise import fast_depthwise
from kdnas.outputs import Outputs
from kdnas.plain import printable
from kdnas.space import Blueprint, Layer
from kdnas.specs import Spec


def build(layer: Layer) -> nn.Module:
    """The layer's module; specs among its arguments become modules first.

    Raises:
        ValueError: the layer's class cannot be imported or called so.
    """
    return _build(layer.make)


def _build(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_build, value))
    if not isinstance(value, Spec):
        return value
    return value.build(nn.Module, **{name: _build(argument) for name, argument in value.arguments})


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], whose: str) -> None:
    """Load a state dict whose names and shapes are those of the module.

    Raises:
        ValueError: other names or shapes; the message begins with `whose`, such as a file, and names the first of each
            kind.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{whose} does not hold the weights of a network by name.")
    own = module.state_dict()
    lacks, more = [n for n in own if n not in state], [n for n in state if n not in own]
    other = [n for n in own if n in state and own[n].shape != state[n].shape]
    facts = [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {fact}, such as {printable(str(names[0]))[:80]}"
        for names, fact in ((lacks, "of the network missing"), (more, "that the network does not have"))
        if names
    ]
    if other:
        shapes = f"{tuple(state[other[0]].shape)} instead of {tuple(own[other[0]].shape)}"
        facts.append(f"{len(other)} of another shape, such as {other[0]} with {shapes}")
    if facts:
        raise ValueError(f"{whose} does not fit the network: {'; '.join(facts)}.")
    module.load_state_dict(state, strict=True)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@final
class Network(nn.Module):
    """Stem, stages, head. A student is one of these, and so is a teacher trained here.

    Images of another size than the blueprint's are resized (bicubic, antialiased); those of a dense blueprint are not.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.stem = build(blueprint.stem)
        self.stages = nn.ModuleList(nn.Sequential(*map(build, stage)) for stage in blueprint.stages)
        self.head = build(blueprint.head)

    def forward(self, images: Tensor) -> Outputs:
        """Logits, `[batch, classes]` or dense ones, one feature map per stage, and every attention layer's map."""
        with attention_maps(self.modules()) as attentions, classified_maps(self.head) as classified:
            x, features = called(self.stem, as_input(images, self.blueprint)), []
            for stage in self.stages:
                for layer in stage.children() if is_recomputing() else (stage,):
                    x = called(layer, x)
                features.append(x)
            outputs = called(self.head, *self.blueprint.head.inputs(x, features))
            logits = as_logits(outputs, images, self.blueprint)
            last = classified[-1] if classified else None
            return Outputs(logits, tuple(features), tuple(attentions), images, classified=last)

    def remaining_layers(self, stage: int, feature: Tensor, outputs: Sequence[Tensor] = ()) -> Tensor:
        """The logits that the layers after a stage compute from this map instead of the stage's own output.

        In training mode their batch norms use this map's statistics and leave the running ones alone.

        Args:
            stage: index of the stage.
            feature: in place of its output.
            outputs: of the stages; needed for a head that reads a stage before this one.

        Raises:
            ValueError: they are needed, and missing.
        """
        maps = outputs_until(stage, feature, outputs, self.blueprint)
        later = nn.ModuleList((*self.stages[stage + 1 :], self.head))
        with untracked(later):
            for part in later[:-1]:
                maps.append(part(maps[-1]))
            return self.head(*self.blueprint.head.inputs(maps[-1], maps))


def outputs_until(stage: int, feature: Tensor, outputs: Sequence[Tensor], blueprint: Blueprint) -> list[Tensor]:
    """The outputs of the stages up to this one, with the map in place of its own.

    Raises:
        ValueError: the head reads one before it, and it is missing.
    """
    if len(outputs) >= stage:
        return [*outputs[:stage], feature]
    earlier = [i for i in blueprint.head.reads if i < stage]
    if earlier:
        raise ValueError(
            f"`outputs` must hold those of the {stage} stages before stage {stage}, as the head reads stage "
            f"{earlier[0]}, got {len(outputs)}."
        )
    return [feature] * (stage + 1)  # those before are not read


def as_input(images: Tensor, blueprint: Blueprint) -> Tensor:
    """Images as the stem of a network takes them."""
    return images if blueprint.dense else resize(images, *blueprint.image[1:])


def as_logits(outputs: Tensor, images: Tensor, blueprint: Blueprint) -> Tensor:
    """The logits of a network from what its head returns."""
    return enlarge(outputs, images) if blueprint.dense else outputs


@contextmanager
def hooked(
    modules: Iterable[nn.Module],
    *,
    before: Callable[[nn.Module, tuple[Any, ...]], None] | None = None,
    after: Callable[[nn.Module, tuple[Any, ...], Any], Any] | None = None,
) -> Iterator[None]:
    """Inside, every call of these modules is preceded by `before(module, inputs)`, followed by `after(..., output)`.

    What `after` returns stands in the output's place, unless it is None. No hook is left behind.
    """
    handles = []
    try:
        for module in modules:
            if before is not None:
                handles.append(module.register_forward_pre_hook(before))
            if after is not None:
                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def modes(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode; afterwards each of its modules has its own mode again."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def untracked(network: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside, its batch norms leave their running statistics alone, and in training mode use those of their input."""
    norms: list[Any] = [m for m in network.modules() if isinstance(m, BATCH_NORMS)]
    before = {norm: norm.track_running_stats for norm in norms}
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield norms
    finally:
        for norm, tracks in before.items():
            norm.track_running_stats = tracks


_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)
_IS_REPEATED: ContextVar[bool] = ContextVar("is_repeated", default=False)


@contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Inside, networks and supernets keep only the inputs of their layers for a backward pass, which runs each again.

    Results are the same bit for bit, batch norm's running statistics among them; a step needs less memory and a second
    forward pass. Outside of a graph nothing changes.

    Reference: Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    token = _RECOMPUTING.set(enabled)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def is_recomputing() -> bool:
    """Whether layers are run again in the backward pass."""
    return _RECOMPUTING.get() and torch.is_grad_enabled()


def is_repeated() -> bool:
    """Whether a layer is run a second time, in a backward pass."""
    return _IS_REPEATED.get()


def called(layer: Callable[..., Any], *inputs: Tensor) -> Any:
    """A layer's output; inside of `recomputing` it is run again for the backward pass."""
    if not is_recomputing():
        with compiled(layer) if isinstance(layer, nn.Module) else nullcontext():
            return _run(layer, *inputs)

    @contextmanager
    def again() -> Iterator[None]:
        token = _IS_REPEATED.set(True)
        try:
            with _unchanged(layer) if isinstance(layer, nn.Module) else nullcontext():
                yield
        finally:
            _IS_REPEATED.reset(token)

    run = functools.partial(_run, layer)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def _run(layer: Callable[..., Any], *inputs: Tensor) -> Any:
    with fast_depthwise(layer, inputs[0]) if isinstance(layer, nn.Module) else nullcontext():
        return layer(*inputs)


@contextmanager
def _unchanged(layer: nn.Module) -> Iterator[None]:
    """Inside, batch norms update copies of their running statistics, which are forgotten."""
    norms = [module for module in layer.modules() if isinstance(module, BATCH_NORMS)]
    before = [norm._buffers for norm in norms]
    for norm in norms:
        norm._buffers = {name: None if b is None else b.clone() for name, b in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers = buffers


@contextmanager
def attention_maps(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of attention layers among these modules inside, in order of execution."""
    with _outputs_of(AttentionMap, modules) as maps:
        yield maps


@contextmanager
def classified_maps(head: nn.Module) -> Iterator[list[Tensor]]:
    """The maps that a head's classifier of every position reads inside; none of a head without a `ClassifiedMap`."""
    with _outputs_of(ClassifiedMap, head.modules()) as maps:
        yield maps


@contextmanager
def _outputs_of(kind: type[nn.Module], modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    maps: list[Tensor] = []
    layers = [module for module in modules if isinstance(module, kind)]
    with hooked(layers, after=lambda _, __, output: maps.append(output)):
        yield maps


def channels_last(images: Tensor) -> Tensor:
    """Images in the memory format in which a CPU's convolutions are fast, which layers hand on; elsewhere as they are.

    A forward pass of a search takes 0.6 to 0.8 of the time (`benchmarks/channels_last.py`): depthwise kernels that are
    larger than their map, and maps of 16x16, are slow in the other. Outputs differ by rounding.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


def image_batches(images: Tensor, most: int = 2**21) -> tuple[Tensor, ...]:
    """Images in batches of at most so many pixels, so that activations fit in memory."""
    return images.split(max(1, most // images.shape[2:].numel()))


def without_weights(blueprint: Blueprint) -> Network:
    """The network with shapes alone, on the meta device: it takes no memory and draws nothing.

    The blueprint comes ready: inside `torch.device("meta")` any other computation gives wrong numbers without an error,
    such as indices of images.

    Example:
        >>> from kdnas import load_space
        >>> space = load_space("toy")
        >>> {p.device.type for p in without_weights(space.blueprint(space.smallest)).parameters()}
        {'meta'}
    """
    with torch.device("meta"):
        return Network(blueprint)


def calibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate batch-norm statistics: reset, then the mean over batches of batch mean and unbiased batch variance.

    Each batch is normalised by its own statistics meanwhile. Only buffers change; the network keeps its mode.
    """
    norms = [m for m in network.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    momenta = {norm: norm.momentum for norm in norms}
    with modes(network), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for images in batches:
                network(images)
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode but its batch norms use the statistics of their very input.

    Running statistics are neither used nor changed.
    """
    with modes(network), untracked(network) as norms:
        for norm in norms:
            norm.training = True
        yield


_DEVICE: ContextVar[torch.device | None] = ContextVar("device", default=None)


def default_device() -> torch.device:
    """Where jobs compute: the device of `on_device`, else a GPU where there is one."""
    return _DEVICE.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def on_device(name: str | None) -> Iterator[None]:
    """Inside, jobs compute on this device, and repeatably (see `repeatable`); None leaves it as it is.

    Args:
        name: as torch writes it, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        ValueError: no such device here.
    """
    device = None
    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
            if device.type == "cpu" and device.index:  # torch takes any
                raise RuntimeError("all cores are one device, cpu")
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"`device` must be one of this machine, such as cpu, got {name!r} ({reason}).") from error
    token = _DEVICE.set(device or _DEVICE.get())
    try:
        with repeatable(default_device()):
            yield
    finally:
        _DEVICE.reset(token)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, a GPU adds in the same order every time, so that equal seeds give equal results; a CPU does anyway.

    An operation for which CUDA has no such algorithm is computed all the same, with torch's warning. What it costs is
    in benchmarks/gpu.md.

    Args:
        device: where is computed.

    Example:
        >>> with repeatable(torch.device("cpu")):
        ...     torch.are_deterministic_algorithms_enabled()
        False
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads it once, when the first product is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, tries = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling new memory with NaN finds programs that read it too early, and takes time.
        memory.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tries
