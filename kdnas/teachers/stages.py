"""Feature maps of a network that was not written for them: outputs of its submodules, recorded while it runs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.network import hooked

_NO_STAGE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),  # the same map again
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),  # the head's
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def first_tensor(output: Any) -> Any:
    """A tensor, or the first entry of a tuple: attention layers and hubs' blocks return more than their output."""
    return output[0] if isinstance(output, tuple | list) and output else output


@contextmanager
def recorded(module: nn.Module, names: Sequence[str], *, copies: bool = True) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules inside, by name, in order of execution; of several calls the last one's.

    They are copies, unless only their shapes are of interest: a layer that works in place would write into the map that
    the layer before it returned.
    """
    known = dict(module.named_modules())
    names_of = {known[name]: name for name in names}
    outputs: dict[str, Tensor] = {}

    def keep(part: nn.Module, _: Any, output: Any) -> None:
        output = first_tensor(output)
        if isinstance(output, Tensor):
            outputs.pop(names_of[part], None)  # a later call comes later in the order, too
            outputs[names_of[part]] = output.clone() if copies else output

    with hooked(names_of, after=keep):
        yield outputs


def as_feature(part: nn.Module, output: Tensor, image: Sequence[int]) -> Tensor | None:
    """A submodule's output as a feature map `[batch, channels, height, width]` or `[batch, tokens, channels]`.

    Whether channels come first or last follows from the layer, where it is a convolution, a linear layer or a layer
    norm, else from the axes: height and width are in the proportion of the image's.

    Args:
        part: the submodule.
        output: what it returned.
        image: height and width of the network's input.

    Returns:
        The map; None for a vector, attention weights, or any other shape.
    """
    if output.dim() == 3:
        return output
    if output.dim() != 4 or not output.is_floating_point():
        return None
    height, width = image
    _, first, middle, last = output.shape
    ahead = abs(middle * width - last * height) < max(height, width)
    behind = abs(first * width - middle * height) < max(height, width)
    if type(part) in (nn.Linear, nn.LayerNorm):
        ahead = False
    if ahead and not isinstance(part, nn.Softmax):
        return output
    return output.permute(0, 3, 1, 2) if behind and not ahead else None


def find_stages(module: nn.Module, images: Tensor, most: int = 6, classes: int | None = None) -> tuple[str, ...]:
    """The submodules whose outputs are the feature maps of a network, in order of execution.

    Of a transformer these are four of its blocks (modules of one class beside each other that return tokens), evenly
    spread; of another network the last maps at each resolution, at most `most`, the deepest. What is inside of a block
    counts only where no outer module returns a map of that resolution.

    Args:
        module: the network, in evaluation mode.
        images: `[batch, channels, height, width]`, as the network takes them.
        most: number of resolutions.
        classes: number of classes, which tells the logits among several outputs.

    Raises:
        ValueError: the module fails on these images, or no submodule returns maps or tokens.
    """
    parts = {n: part for n, part in module.named_modules() if n and not isinstance(part, _NO_STAGE)}
    with recorded(module, list(parts), copies=False) as outputs, torch.no_grad():
        returned = run(module, images)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, output in outputs.items():
        feature = as_feature(parts[name], output, images.shape[2:])
        if feature is not None and len(feature) == len(images):
            shapes[name] = tuple(feature.shape[1:])
    maps = [name for name, shape in shapes.items() if len(shape) == 3 and shape[1] * shape[2] > 1]
    tokens = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] > 1]
    while maps and len(maps) > 1 and shapes[maps[-1]][0] == _num_logits(returned, classes):
        maps.pop()  # a convolution that classifies
    order = {name: place for place, name in enumerate(shapes)}
    blocks = sorted(_token_blocks(module, tokens), key=order.__getitem__)
    # A transformer may begin with convolutions, but no map follows its blocks.
    if len(blocks) >= 4 and not any(order[name] > order[blocks[-1]] for name in maps):
        return tuple(blocks[(i + 1) * len(blocks) // 4 - 1] for i in range(4))
    last = _last_maps(module, {name: shapes[name] for name in maps})
    if last or tokens:
        return tuple(sorted(last, key=order.__getitem__)[-most:]) or tuple((blocks or tokens)[-1:])
    raise ValueError(
        "no submodule of the teacher returns a feature map or tokens. Name its stages, or pass `stages=()` and use "
        "losses of logits only."
    )


def _num_logits(returned: Any, classes: int | None) -> int:
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
    kinds = Counter(type(module.get_submodule(name)) for name in blocks)
    return [name for name in blocks if type(module.get_submodule(name)) is kinds.most_common(1)[0][0]]


def _last_maps(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The last of the outermost maps at each resolution; `shapes` are in order of execution."""
    blocks = tuple(f"{name}." for name in _repeated(module, list(shapes)))
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
        if shape[1:] not in chosen or depth(name) <= depth(chosen[shape[1:]]):
            chosen[shape[1:]] = name
    return list(chosen.values())


def run(module: nn.Module, images: Tensor) -> Any:
    """What the module returns for these images.

    Raises:
        ValueError: it fails on them; the message has the size and the module's own words.
    """
    try:
        return module(images)
    except Exception as error:  # other people's networks raise whatever they like
        _, *image = images.shape
        reason = f"{type(error).__name__}: " * (not isinstance(error, RuntimeError)) + str(error).partition("\n")[0]
        raise ValueError(
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
    return any(child.children()) or not type(child).__module__.startswith("torch.nn")


def logits_of(outputs: Any, classes: int | None = None) -> Tensor:
    """The logits `[batch, classes]` among what a network returned.

    A tensor; `logits` of a mapping or of an object; else the tensor with two axes of a mapping, a tuple or a list, of
    several the first with this number of classes. A map of one pixel counts as a vector.

    Args:
        outputs: what the network returned.
        classes: number of classes, if it is known.

    Raises:
        ValueError: there is none.
    """
    if isinstance(outputs, Tensor):
        pixel = outputs.dim() == 4 and outputs.shape[2:] == (1, 1)
        return (outputs[:, :, 0, 0] if pixel else outputs).float()
    entry = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(entry, Tensor):
        return logits_of(entry)
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple | list) else ()
    vectors = [value for value in values if isinstance(value, Tensor) and value.dim() == 2]
    fitting = [vector for vector in vectors if classes in (None, vector.shape[1])]
    if fitting:
        return fitting[0].float()
    contents = f" of {', '.join(map(_shape, values))}" if values else ""
    raise ValueError(
        f"the teacher must return logits [batch, classes], alone, in a tuple or under the name logits, got a "
        f"{type(outputs).__name__}{contents}. Return the logits alone."
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
