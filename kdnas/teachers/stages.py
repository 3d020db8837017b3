"""Feature maps of a network that was not written for them: outputs of its submodules, recorded while it runs."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.network import hooked
from kdnas.runtimes import joined

_NO_STAGE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),  # the same map again
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),  # the head's
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),  # the map and its border
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)
_REACH = 0.5  # the share of a network's layers over positions that must have run before its last stage


def _main_tensor(output: Any, batch: int) -> Tensor | None:
    """A tensor, or the first in a tuple with an entry per image: attention layers return more than their output."""
    entries = output if isinstance(output, tuple | list) else (output,)
    tensors = [entry for entry in entries if isinstance(entry, Tensor) and entry.dim()]
    return next((tensor for tensor in tensors if len(tensor) == batch), tensors[0] if tensors else None)


@contextmanager
def recorded(
    module: nn.Module, names: Sequence[str], *, copies: bool = True, batch: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules inside, by name, in order of execution; of several calls the last one's.

    They are copies, unless only their shapes are of interest: a layer that works in place would write into the map that
    the layer before it returned. Of several tensors the first of `batch` entries counts, else the first.

    Raises:
        ValueError: a TorchScript module, whose output cannot be recorded.
    """
    known = dict(module.named_modules())
    names_of = {known[name]: name for name in names}
    script = next((name for part, name in names_of.items() if isinstance(part, torch.jit.ScriptModule)), None)
    if script is not None:
        raise ValueError(
            f"{script} of the teacher is a TorchScript module, which shows no feature maps. Put the Python module "
            "there that it was made from, or name other stages: Frozen(module, preprocessing=..., stages=...)."
        )
    outputs: dict[str, Tensor] = {}

    def keep(part: nn.Module, _: Any, output: Any) -> None:
        tensor = _main_tensor(output, batch)
        if tensor is not None:
            outputs.pop(names_of[part], None)  # a later call comes later in the order, too
            outputs[names_of[part]] = tensor.clone() if copies else tensor

    with hooked(names_of, after=keep):
        yield outputs


def as_feature(part: nn.Module, output: Tensor, images: Sequence[int]) -> Tensor | None:
    """A submodule's output as a feature map `[batch, channels, height, width]` or `[batch, tokens, channels]`.

    Whether channels come first or last follows from the layer, where it is a convolution, a linear layer or a layer
    norm, else from the axes: height and width are in the proportion of the image's. Tokens come before the batch where
    the second axis has an entry per image and the first has not; where both have, as attention inside is built.

    Args:
        part: the submodule.
        output: what it returned.
        images: the shape of the network's input.

    Returns:
        The map; None for a vector, attention weights, or any other shape.
    """
    batch, _, height, width = images
    if output.dim() == 3:
        if isinstance(part, _CHANNELS_FIRST):
            return output.transpose(1, 2)
        first, second = (size == batch for size in output.shape[:2])
        return output.transpose(0, 1) if second and (not first or _tokens_first(part)) else output
    if output.dim() != 4 or not output.is_floating_point():
        return None
    _, first, middle, last = output.shape
    ahead = abs(middle * width - last * height) < max(height, width)
    behind = abs(first * width - middle * height) < max(height, width)
    if type(part) in (nn.Linear, nn.LayerNorm):
        ahead = False
    if ahead and not isinstance(part, nn.Softmax):
        return output
    return output.permute(0, 3, 1, 2) if behind and not ahead else None


def _tokens_first(part: nn.Module) -> bool:
    """Whether attention or recurrence inside has the batch as its second axis."""
    layers = [m for m in part.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
    return bool(layers) and not any(layer.batch_first for layer in layers)


def find_stages(module: nn.Module, images: Tensor, most: int = 6, classes: int | None = None) -> tuple[str, ...]:
    """The submodules whose outputs are the feature maps of a network, the deepest last.

    Of a transformer these are four of its blocks (modules of one class beside each other that return tokens), evenly
    spread, in order of execution; of another network the last maps at each resolution, the finest first, at most
    `most`, the coarsest. What is inside of a block counts only where no outer module returns a map of that resolution.
    Where half of the layers follow, these are not taken: a transformer of fewer blocks has all of them as its stages.

    Args:
        module: the network, in evaluation mode.
        images: `[batch, channels, height, width]`, as the network takes them.
        most: number of resolutions.
        classes: number of classes, which tells the logits among several outputs; 0 for a network without classes.

    Raises:
        ValueError: the module fails on these images, no submodule returns maps or tokens, or only early ones do.
    """
    parts = {n: part for n, part in module.named_modules() if n and not isinstance(part, _NO_STAGE)}
    with recorded(module, list(parts), copies=False, batch=len(images)) as outputs, torch.no_grad():
        returned = run(module, images)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, output in outputs.items():
        feature = as_feature(parts[name], output, images.shape)
        if feature is not None and len(feature) == len(images):
            shapes[name] = tuple(feature.shape[1:])
    order = list(outputs)
    layers = [order.index(name) for name, output in outputs.items() if _computes_positions(parts[name], output)]

    def is_deep(names: Sequence[str]) -> bool:
        end = max(map(order.index, names))
        return sum(place <= end for place in layers) >= _REACH * len(layers)

    candidates = [names for names in _candidates(module, shapes, _num_logits(returned, classes), most) if names]
    deep = next(filter(is_deep, candidates), None)
    if deep is not None:
        return deep
    if candidates:
        raise ValueError(
            f"the last submodule of the teacher that returns a feature map or tokens, {candidates[0][-1]!r}, comes "
            "before most of its layers. Name its stages: Frozen(module, preprocessing=..., stages=...), or pass "
            "`stages=()` and use losses of logits only."
        )
    raise ValueError(
        "no submodule of the teacher returns a feature map or tokens. Name its stages, or pass `stages=()` and use "
        "losses of logits only."
    )


def find_classifier(module: nn.Module, images: Tensor, classes: int | None = None) -> str:
    """The submodule that classifies every position: the last layer with a weight that the maps of logits depend on.

    Of several, of which each classifies a map of its own, it is that of the deepest map.

    Layers with one weight per channel, such as norms, are none; nor are those of auxiliary heads, on which the logits
    do not depend.

    Args:
        module: the network, in evaluation mode.
        images: `[batch, channels, height, width]`, as the network takes them.
        classes: number of classes, as in `find_stages`.

    Returns:
        Its name; empty where there is none whose input is a map or tokens, or the network hides it.
    """
    names = {part: name for name, part in module.named_modules() if _has_matrix(part)}
    outputs: dict[str, Tensor] = {}
    maps: dict[str, Tensor] = {}

    def replace(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        outputs.pop(names[part], None)
        if not isinstance(output, Tensor) or _map_read(part, inputs) is None:
            return None
        maps[names[part]] = inputs[0]
        # With a graph from here; a copy, as the next layer may work in place.
        outputs[names[part]] = output.detach().requires_grad_()
        return outputs[names[part]].clone()

    try:
        with hooked(names, after=replace), torch.enable_grad():
            logits = logits_of(run(module, images), classes, dense=True)
            read = _behind(logits[:, :1], outputs)
            order = {name: place for place, name in enumerate(outputs)}
            depths = {name: max((order[other] for other in _behind(maps[name], outputs)), default=-1) for name in read}
        return max(reversed(read), key=depths.__getitem__, default="")
    except (RuntimeError, ValueError):
        return ""


def _behind(x: Tensor, leaves: Mapping[str, Tensor]) -> list[str]:
    """The leaves of a graph, by name, that a tensor depends on."""
    if not x.requires_grad:
        return []
    slopes = torch.autograd.grad(x.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    return [name for name, slope in zip(leaves, slopes, strict=True) if slope is not None]


@contextmanager
def classified_map(module: nn.Module, classifier: str) -> Iterator[list[Tensor]]:
    """The map that a network's layer of this name reads inside; nothing for an empty name."""
    maps: list[Tensor] = []

    def keep(part: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        feature = _map_read(part, inputs)
        maps[:] = [] if feature is None else [feature.clone()]

    with hooked([module.get_submodule(classifier)] if classifier else [], after=keep):
        yield maps


def _has_matrix(part: nn.Module) -> bool:
    """Whether it is a single layer with a weight for every pair of channels."""
    weight = getattr(part, "weight", None)
    return not any(part.children()) and isinstance(weight, Tensor) and weight.dim() > 1


def _map_read(part: nn.Module, inputs: tuple[Any, ...]) -> Tensor | None:
    """The input of a layer with a weight matrix as a map or tokens; None where it has no positions."""
    x, weight = inputs[0] if inputs else None, part.weight
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return None
    if x.dim() == weight.dim() > 2:  # a convolution: channels come second
        return x if x.dim() == 4 else x.transpose(1, 2) if x.dim() == 3 else None
    return {3: x, 4: x.movedim(-1, 1)}.get(x.dim()) if weight.dim() == 2 and x.dim() > 2 else None


def _candidates(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], num_logits: int, most: int
) -> Iterator[tuple[str, ...]]:
    """Choices of stages, the best first; `shapes` are those of maps and tokens, in order of execution."""
    order = {name: place for place, name in enumerate(shapes)}
    tokens = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] > 1]
    tokens = _outside(module, tokens, [name for name, shape in shapes.items() if len(shape) == 3])
    blocks = sorted(_token_blocks(module, tokens), key=order.__getitem__)
    maps = [name for name, shape in shapes.items() if len(shape) == 3 and shape[1] * shape[2] > 1]
    maps = [name for name in maps if shapes[name][0] > 1] or maps  # a map of one channel is a gate
    maps = _outside(module, maps, blocks)
    while len(maps) > 1 and shapes[maps[-1]][0] == num_logits:
        maps.pop()  # a convolution that classifies
    # A transformer may begin with convolutions, but no map follows its blocks.
    if len(blocks) >= 4 and not any(order[name] > order[blocks[-1]] for name in maps):
        yield tuple(blocks[(i + 1) * len(blocks) // 4 - 1] for i in range(4))
    last = _last_maps(module, {name: shapes[name] for name in maps})
    yield tuple(sorted(last, key=lambda name: (-math.prod(shapes[name][1:]), order[name]))[-most:])
    yield tuple(blocks[-most:] or tokens[-1:])


def _outside(module: nn.Module, names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The submodules with these names that are not inside of others, by any of their paths."""
    prefixes = tuple(f"{name}." for name in others)
    inside = {part for path, part in module.named_modules(remove_duplicate=False) if path.startswith(prefixes)}
    return [name for name in names if module.get_submodule(name) not in inside]


def _computes_positions(part: nn.Module, output: Tensor) -> bool:
    """Whether it is a single layer with weights whose output has positions."""
    is_layer = not any(part.children()) and next(part.parameters(), None) is not None
    return is_layer and (output.dim() == 3 or (output.dim() == 4 and output[0, 0].numel() > 1))


def _num_logits(returned: Any, classes: int | None) -> int:
    if classes == 0:
        return 0
    try:
        shape = logits_of(returned, classes).shape
    except ValueError:
        shape = torch.Size()
    return shape[1] if len(shape) > 1 else 0


def _token_blocks(module: nn.Module, tokens: Sequence[str]) -> list[str]:
    """The blocks of a transformer, those inside of its stages where these are fewer than four."""
    blocks = _repeated(module, tokens)
    inner = [f"{block}.{name}" for block in blocks for name in _repeated(module.get_submodule(block), tokens, block)]
    blocks = inner if len(blocks) < 4 <= len(inner) else blocks
    groups: dict[object, list[str]] = {}
    for name in blocks:
        groups.setdefault(type(module.get_submodule(name)), []).append(name)
    # Of equal numbers those that end last: a stage of one block has one embedding, too.
    alike = [*groups.values(), *_alike(module, tokens, blocks)]
    return max(alike, key=lambda names: (len(names), tokens.index(names[-1])), default=[])


def _alike(module: nn.Module, tokens: Sequence[str], blocks: Sequence[str]) -> list[list[str]]:
    """Outermost submodules outside of these blocks that have one class and the same place in several stages."""
    places: dict[tuple[str, object], list[str]] = {}
    for name in tokens:
        part = module.get_submodule(name)
        inside = any(name.startswith(f"{other}.") for other in tokens)
        if not inside and name not in blocks and any(part.children()):
            places.setdefault((re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), type(part)), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _last_maps(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The last of the outermost maps at each resolution; `shapes` are in order of execution.

    A block is taken before an earlier module that is none, however deep it lies: a stem has the resolution of the first
    stage.
    """
    repeated = frozenset(_repeated(module, list(shapes)))
    blocks = tuple(f"{name}." for name in repeated)
    outer = {name: shape for name, shape in shapes.items() if not name.startswith(blocks)}
    if len({shape[1:] for shape in outer.values()}) < 2:
        outer = dict(shapes)
    parts = dict(module.named_modules())

    def depth(name: str) -> int:
        """Number of modules around it, without plain sequences and lists."""
        steps = name.split(".")
        around = [parts[".".join(steps[:count])] for count in range(1, len(steps))]
        return sum(type(part) not in _CONTAINERS for part in around)

    chosen: dict[tuple[int, ...], str] = {}
    for name, shape in outer.items():
        before = chosen.get(shape[1:])
        if before is None or depth(name) <= depth(before) or (name in repeated and before not in repeated):
            chosen[shape[1:]] = name
    return list(chosen.values())


class ImagesRefused(ValueError):
    """A network fails on images of some size."""


def run(module: nn.Module, images: Tensor) -> Any:
    """What the module returns for these images.

    Raises:
        ImagesRefused: it fails on them; the message has the size and the module's own words.
    """
    try:
        return module(images)
    except Exception as error:  # other people's networks raise whatever they like
        _, *image = images.shape
        reason = f"{type(error).__name__}: " * (not isinstance(error, RuntimeError)) + str(error).partition("\n")[0]
        raise ImagesRefused(
            f"the teacher must accept images of {' x '.join(map(str, image))}, but it fails on them ({reason}). Give "
            "the size that it was trained with: Frozen(module, preprocessing=Preprocessing(height=..., width=..., "
            "mean=..., std=...)), see docs/teachers.md."
        ) from error


def _repeated(module: nn.Module, names: Sequence[str], above: str = "") -> list[str]:
    """Of the submodules with these names the outermost that have a sibling of their class among them.

    Single layers of torch are no blocks.

    Args:
        module: the network, or a part of it.
        names: in the whole network.
        above: the name of `module` in the network; names are returned without it.
    """
    among, chosen = set(names), list[str]()
    for path, part in module.named_modules():
        if any(path.startswith(f"{name}.") or path == name for name in chosen):
            continue
        prefix = f"{path}." if path else ""
        children = {
            prefix + name: type(child)
            for name, child in part.named_children()
            if ".".join(filter(None, (above, prefix + name))) in among and _may_be_block(child, part)
        }
        kinds = list(children.values())
        chosen += [name for name, kind in children.items() if kinds.count(kind) > 1]
    return chosen


def _may_be_block(child: nn.Module, parent: nn.Module) -> bool:
    """Whether it is no single layer of torch, and no sequence beside others that may be anything."""
    if type(child) is nn.Sequential:
        return type(parent) in _CONTAINERS
    return any(child.children()) or not type(child).__module__.startswith("torch.")


def logits_of(outputs: Any, classes: int | None = None, *, dense: bool = False) -> Tensor:
    """The logits `[batch, classes]`, for `dense` `[batch, classes, height, width]`, among what a network returned.

    A tensor; the entry `logits`, else `out`, `output` or `prediction`, of a mapping, a named tuple or an object; else
    the only tensor with two axes, for `dense` with four, and with this number of classes. A map of one pixel counts as
    a vector, unless for `dense`. For `dense` also a map and a vector that have so many together, such as lanes and
    their existence: the numbers of the vector become maps after the others.

    Args:
        outputs: what the network returned.
        classes: number of classes, if it is known.
        dense: whether they are maps.

    Raises:
        ValueError: there is none.
    """
    if isinstance(outputs, Tensor):
        if not outputs.is_floating_point() or outputs.layout is not torch.strided:
            raise ValueError(
                f"the teacher's logits must be a dense tensor of floats, got {outputs.dtype}, {outputs.layout}. Return "
                "what is before its argmax or rounding."
            )
        pixel = not dense and outputs.dim() == 4 and outputs.shape[2:] == (1, 1)
        return (outputs[:, :, 0, 0] if pixel else outputs).float()
    entries = _entries(outputs)
    if dense and classes is not None:
        maps, vectors = ([x for x in entries.values() if isinstance(x, Tensor) and x.dim() == n] for n in (4, 2))
        if len(maps) == len(vectors) == 1 and maps[0].shape[1] + vectors[0].shape[1] == classes:
            return joined((maps[0], vectors[0])).float()
    named = {name.casefold().rstrip("s"): value for name, value in entries.items() if isinstance(value, Tensor)}
    main = next((named[name] for name in _LOGITS if name in named), None)
    if main is not None:
        return logits_of(main, dense=dense)
    dims = 4 if dense else 2
    fitting = {
        name: value
        for name, value in entries.items()
        if isinstance(value, Tensor) and value.dim() == dims and classes in (None, value.shape[1])
    }
    if len(fitting) == 1:
        return logits_of(next(iter(fitting.values())), dense=dense)
    contents = ", ".join(_shape(value) for value in entries.values() if value is not None)
    contents = contents and f" of {contents}"
    several = f", of which {' and '.join(fitting)} may be the logits" if fitting else ""
    raise ValueError(
        f"the teacher must return logits {_LOGITS_SHAPE[dense]}, alone, in a tuple or under the name logits, got a "
        f"{type(outputs).__name__}{contents}{several}. Return the logits alone; features need --unlabelled."
    )


_LOGITS_SHAPE = {False: "[batch, classes]", True: "[batch, classes, height, width]"}
_LOGITS = ("logit", "out", "output", "prediction")
_VECTORS = ("pooler_output", "image_embeds", "x_norm_clstoken", "embedding", "embeddings", "pooled", "features")
_POSITIONS = ("last_hidden_state", "x_norm_patchtokens", "feature_maps", "hidden_states")


def features_of(outputs: Any) -> Tensor:
    """One vector per image, `[batch, dims]`, from what a network without classes returned.

    A tensor, of tokens or a map its mean over positions; the entry `pooler_output` and its like of a mapping, a named
    tuple or an object; else the only tensor with two axes, or the mean over positions of `last_hidden_state` and its
    like, of several maps the last one's.

    Args:
        outputs: what the network returned.

    Raises:
        ValueError: there is none.
    """
    if isinstance(outputs, Tensor) and outputs.is_floating_point() and 2 <= outputs.dim() <= 4:
        feature = outputs.flatten(2).mean(2) if outputs.dim() == 4 else outputs
        return (feature.mean(1) if feature.dim() == 3 else feature).float()
    entries = {} if isinstance(outputs, Tensor) else _entries(outputs)
    vectors = {n: v for n, v in entries.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2}
    vectors |= {n: v[-1] for n, v in entries.items() if isinstance(v, tuple | list) and v and isinstance(v[-1], Tensor)}
    flat = [name for name, value in vectors.items() if value.dim() == 2]
    names = [*(name for name in _VECTORS if name in vectors), *(flat if len(flat) == 1 else ())]
    name = next(iter([*names, *(name for name in _POSITIONS if name in vectors)]), None)
    if name is None and len(vectors) == 1:
        name = next(iter(vectors))
    if name is None:
        raise ValueError(
            f"the teacher must return features: a vector for each image [batch, dims], tokens or a map, got "
            f"{_shape(outputs)}{' of ' + ', '.join(map(_shape, entries.values())) if entries else ''}. Return the "
            "vectors alone."
        )
    return features_of(vectors[name])


def _entries(outputs: Any) -> dict[str, Any]:
    """What a mapping, a sequence or an object holds, by name or number."""
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items()}
    if hasattr(outputs, "_asdict"):
        return outputs._asdict()
    if isinstance(outputs, tuple | list):
        return {f"number {index}": value for index, value in enumerate(outputs)}
    return {**getattr(outputs, "__dict__", {}), "logits": getattr(outputs, "logits", None)}


def check_logits(logits: Tensor, count: int, name: str, *, dense: bool = False) -> None:
    """Raise a ValueError for logits that are not one row per image, or for `dense` one map."""
    if logits.dim() != (4 if dense else 2) or len(logits) != count:
        shape = tuple(logits.shape)
        raise ValueError(
            f"the teacher {name} must return logits {_LOGITS_SHAPE[dense]}, got {shape} for {count} images. Features "
            "instead of logits need --unlabelled."
        )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def plain_module(module: nn.Module) -> nn.Module:
    """The module that compiled and parallel wrappers call: a hook inside of these is not called, or compiles anew."""
    wrapped = getattr(module, "_orig_mod", None)
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapped = module.module
    if isinstance(wrapped, nn.Module):
        return plain_module(wrapped)
    for part in module.modules():
        for name, child in list(part.named_children()):
            if isinstance(inner := getattr(child, "_orig_mod", None), nn.Module):
                setattr(part, name, inner)
        part._compiled_call_impl = None
    return module
