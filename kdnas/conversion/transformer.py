"""Recognising a plain vision transformer, and putting its weights into a supernet of its space."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.conversion.base import Conversion, ModuleReport, compare
from kdnas.network import hooked
from kdnas.randomness import torch_rng
from kdnas.spaces.converted import UNIT, narrower
from kdnas.spaces.vit import ViT
from kdnas.supernet import Supernet

# Ten times what the logits are held to: rounding adds up over the blocks, and what is built otherwise is far off.
_TOLERANCE = 1e-4
_STREAM = "its channels are the tokens', and a layer norm over some of them would not be the source's function"


@final
@dataclass(frozen=True)
class _Layout:
    """Where a kind of vision transformer keeps its parts; those of a block are inside the block."""

    kind: str
    patches: str
    class_token: str
    positions: str
    blocks: str
    norm: str
    head: str
    norms: tuple[str, str]
    attention: str
    fused: str  # what the names of the queries', keys' and values' joint weight and bias begin with
    out: str
    up: str
    activation: str
    down: str
    scales: tuple[str, str]  # learned factors of the two branches, where there are any

    def expected(self, blocks: list[str]) -> tuple[set[str], set[str]]:
        """Names of the tensors that a plain transformer has, and of those that it may have."""
        needed = {self.class_token, self.positions}
        layers = [self.patches, self.norm, self.head]
        allowed: set[str] = set()
        for block in blocks:
            layers += [f"{block}.{part}" for part in (*self.norms, self.out, self.up, self.down)]
            needed.add(f"{block}.{self.fused}weight")
            allowed |= {f"{block}.{self.fused}bias", *(f"{block}.{scale}" for scale in self.scales)}
        return needed | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}, allowed


_LAYOUTS = (
    _Layout(
        kind="torchvision's VisionTransformer",
        patches="conv_proj",
        class_token="class_token",
        positions="encoder.pos_embedding",
        blocks="encoder.layers",
        norm="encoder.ln",
        head="heads.head",
        norms=("ln_1", "ln_2"),
        attention="self_attention",
        fused="self_attention.in_proj_",
        out="self_attention.out_proj",
        up="mlp.0",
        activation="mlp.1",
        down="mlp.3",
        scales=("", ""),
    ),
    _Layout(
        kind="timm's VisionTransformer",
        patches="patch_embed.proj",
        class_token="cls_token",
        positions="pos_embed",
        blocks="blocks",
        norm="norm",
        head="head",
        norms=("norm1", "norm2"),
        attention="attn",
        fused="attn.qkv.",
        out="attn.proj",
        up="mlp.fc1",
        activation="mlp.act",
        down="mlp.fc2",
        scales=("ls1.gamma", "ls2.gamma"),
    ),
)
# What stands out in a tensor's name, and what it is part of.
_OTHERS = {
    "dist_token": "a distillation token with a head of its own",
    "reg_token": "register tokens",
    "q_norm": "normalised queries and keys",
    "k_norm": "normalised queries and keys",
    "bias_k": "a key and a value beside those of the tokens",
    "bias_v": "a key and a value beside those of the tokens",
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "norm_pre": "a norm before the blocks",
    "fc_norm": "a head on pooled tokens in place of the class token",
    "attn_pool": "a head that pools by attention",
    "pre_logits": "a hidden layer before the classifier",
    "patch_embed": "a stem that is more than one convolution",
    "conv_proj": "a stem that is more than one convolution",
}
_PLAIN = (
    "Converted are plain vision transformers, laid out as torchvision's or timm's VisionTransformer: one convolution "
    "of patches, a class token, learned absolute positions, blocks with a layer norm before each branch, GELU, and a "
    "linear classifier on the class token."
)


class _Shape(NamedTuple):
    """The numbers of a recognised transformer."""

    patch: int
    side: int
    width: int
    heads: int
    head_width: int
    hidden: int
    eps: float
    bias: bool
    classes: int


def transformer(module: nn.Module, image: tuple[int, int, int], name: str) -> Conversion | None:
    r"""A plain vision transformer as a supernet, or None where nothing attends.

    The space is one of `kdnas.spaces.vit`. *Depth*: the last blocks may be left out, at most a half. *Heads* of each
    block: a half, three quarters or all. *Inner width* of each block: likewise, in multiples of 8. The tokens' width
    is fixed, since a layer norm over some channels is another function than the source's. Heads, and channels
    between the two linear layers, are sorted by importance, the sum of the absolute weights with which the
    projection behind them reads them ($\sum |W_{:,c}|$), so that the leading ones matter most; the full network's
    function does not change by it, but for the order in which floating point adds.

    A class token and its position, which are only ever added, become one vector. Learned factors of a branch
    (LayerScale) are multiplied into its last projection, exactly: $\gamma (W x + b) = (\gamma W) x + \gamma b$.
    The parts are then compared with the source's, one after the other, on random images.

    Args:
        module: in evaluation mode.
        image: channels, height and width, which are equal.
        name: of the space.

    Raises:
        ValueError: something attends, but it is no plain vision transformer, or one for other images: what and why.

    References: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; Michel, Levy, Neubig, Are Sixteen Heads
        Really Better than One?, NeurIPS 2019, whose gradient-based importance needs data; the sum of absolute weights
        is that of Cai et al., Once-for-All, ICLR 2020, section 3.3, which needs none.
    """
    parts = dict(module.named_modules())
    attends = next((path for path, part in parts.items() if hasattr(part, "num_heads")), None)
    if attends is None:
        return None
    for layout in _LAYOUTS:
        if {layout.blocks, layout.patches.partition(".")[0]} <= parts.keys():
            break
    else:
        raise _refusal(
            f"{attends} ({type(parts[attends]).__name__}) attends, in a network that is laid out otherwise, or that "
            "holds a transformer and more"
        )
    blocks = [f"{layout.blocks}.{child}" for child, _ in parts[layout.blocks].named_children()]
    tensors = {n: t.detach() for n, t in module.named_parameters(remove_duplicate=False)}
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    _check_names(module, tensors, layout, blocks)
    shape = _shape(parts, tensors, layout, blocks, image)
    least = math.ceil(len(blocks) / 2)
    space = ViT(
        name=name,
        source="kdnas convert",
        classes=shape.classes,
        image_channels=image[0],
        resolutions=(image[1],),
        patch=shape.patch,
        widths=(shape.width,),
        depths=tuple(range(least, len(blocks) + 1)),
        heads=narrower(shape.heads, 1),
        ratios=tuple(option / shape.width for option in narrower(shape.hidden, UNIT)),
        head_width=shape.head_width,
        reach=0,
        cuts=tuple(sorted({least // 3, 2 * least // 3} - {0})),
        drop_path=0.0,
        pool="class",
        norm_eps=shape.eps,
        qkv_bias=shape.bias,
    )
    supernet = Supernet(space).eval()
    layers = dict(space.blueprint(space.largest).named_layers())
    positions = [position for position in layers if position.startswith("stages")]
    weights = {"stem": _stem(tensors, layout, shape), "head": _head(tensors, layout)}
    weights |= {p: _block(tensors, b, layout, shape) for p, b in zip(positions, blocks, strict=True)}
    for position, held in weights.items():
        try:
            supernet.bank_module(position, layers[position]).load_state_dict(held)
        except RuntimeError as error:
            raise _refusal(f"{position} has weights of other shapes: {str(error).splitlines()[-1].strip()}") from error
    _compare(module, supernet, layout, dict(zip(positions, blocks, strict=True)), image)
    report = tuple(ModuleReport(*row) for row in _rows(parts, tensors, layout, blocks, space))
    return Conversion(space, supernet, report, compare(module, supernet))


def _refusal(what: str) -> ValueError:
    return ValueError(f"{what}. {_PLAIN}")


def _check_names(module: nn.Module, tensors: dict[str, Tensor], layout: _Layout, blocks: list[str]) -> None:
    """Refuse whatever has more or fewer tensors than a plain transformer."""
    pool = getattr(module, "global_pool", "token")
    if pool != "token":
        raise _refusal(f"the head pools the tokens (global_pool={pool!r}), it does not take the class token")
    if not blocks:
        raise _refusal(f"{layout.blocks} is empty")
    needed, allowed = layout.expected(blocks)
    for name in tensors:
        if name not in needed | allowed:
            what = next((what for key, what in _OTHERS.items() if key in name), "")
            raise _refusal(f"{name} is no part of a plain vision transformer{': it belongs to ' * bool(what)}{what}")
    for name in sorted(needed - tensors.keys()):
        raise _refusal(f"there is no {name}, as {layout.kind} has it")


def _grid(
    parts: dict[str, nn.Module], tensors: dict[str, Tensor], layout: _Layout, image: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The patches' size, how many there are on a side, and the tokens' width.

    Raises:
        ValueError: the stem is no convolution of patches, or for other images.
    """
    stem: Any = parts[layout.patches]
    patch = stem.kernel_size[0] if isinstance(stem, nn.Conv2d) else 0
    if not patch or [stem.kernel_size, stem.stride, stem.padding, stem.dilation, stem.groups] != [
        (patch, patch),
        (patch, patch),
        (0, 0),
        (1, 1),
        1,
    ]:
        raise _refusal(f"{layout.patches} must be a convolution of square patches side by side, it is {stem}")
    if stem.in_channels != image[0]:
        raise ValueError(f"the network takes images of {stem.in_channels} channels, got {image[0]}.")
    width, side = stem.out_channels, image[1] // patch
    tokens = tensors[layout.positions].numel() // width
    for name, expected in ((layout.class_token, (1, 1, width)), (layout.positions, (1, tokens, width))):
        if tensors[name].shape != expected:
            raise _refusal(f"{name} must have the shape {expected}, and has {tuple(tensors[name].shape)}")
    if tokens - side * side not in (0, 1) or image[1] % patch:
        own = math.isqrt(tokens)
        raise ValueError(
            f"{layout.positions} holds {tokens} positions, those of {own} x {own} patches and a class token, and "
            f"images of {image[1]} x {image[1]} have {image[1] / patch:g} x {image[1] / patch:g} patches. Give the "
            f"size the network was made for, {own * patch}."
        )
    return patch, side, width


def _shape(
    parts: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    layout: _Layout,
    blocks: list[str],
    image: tuple[int, int, int],
) -> _Shape:
    """The numbers, where they are those of a plain transformer whose blocks are alike.

    Raises:
        ValueError: they are not.
    """
    patch, side, width = _grid(parts, tensors, layout, image)
    norms = [layout.norm, *(f"{block}.{norm}" for block in blocks for norm in layout.norms)]
    eps: set[float] = set()
    for norm in norms:
        part = parts[norm]
        if not isinstance(part, nn.LayerNorm):
            raise _refusal(f"{norm} is a {type(part).__name__}, no layer norm")
        eps.add(part.eps)
    inner = tensors[f"{blocks[0]}.{layout.out}.weight"].shape[1]
    shapes = []
    for block in blocks:
        activation = parts.get(f"{block}.{layout.activation}", nn.Identity())
        if not _is_gelu(activation):
            raise _refusal(f"{block}.{layout.activation} ({type(activation).__name__}) is not GELU in its exact form")
        heads: Any = getattr(parts[f"{block}.{layout.attention}"], "num_heads", 1)
        hidden, read = (
            tensors[f"{block}.{layout.up}.weight"].shape[0],
            tensors[f"{block}.{layout.down}.weight"].shape[1],
        )
        if hidden != read:
            raise _refusal(
                f"{block}.{layout.up} makes {hidden} channels and {block}.{layout.down} reads {read} of them"
            )
        shapes.append((heads, hidden, f"{block}.{layout.fused}bias" in tensors))
        fused = tensors[f"{block}.{layout.fused}weight"].shape
        if tuple(fused) != (3 * inner, width) or inner % heads:
            raise _refusal(
                f"{block}.{layout.fused}weight must hold queries, keys and values of {heads} heads for {width} "
                f"channels, {inner} of each, and has shape {tuple(fused)}"
            )
    for what, values in (("heads, inner widths or biases of their own", set(shapes)), ("layer norms' eps", eps)):
        if len(values) > 1:
            raise _refusal(f"the blocks have {what}, {sorted(values)}: they must be alike")
    heads, hidden, bias = shapes[0]
    classes = tensors[f"{layout.head}.weight"].shape[0]
    return _Shape(patch, side, width, heads, inner // heads, hidden, eps.pop(), bias, classes)


def _is_gelu(activation: nn.Module) -> bool:
    values = torch.linspace(-4, 4, 101)
    with torch.no_grad():
        return torch.allclose(activation(values.clone()), F.gelu(values), rtol=0, atol=1e-6)


def _stem(tensors: dict[str, Tensor], layout: _Layout, shape: _Shape) -> dict[str, Tensor]:
    positions, token = tensors[layout.positions][0], tensors[layout.class_token].flatten()
    places = shape.side * shape.side
    if len(positions) > places:
        token, positions = token + positions[0], positions[1:]
    return {
        "patches.weight": tensors[f"{layout.patches}.weight"],
        "patches.bias": tensors[f"{layout.patches}.bias"],
        "positions": positions.T.reshape(1, shape.width, shape.side, shape.side),
        "class_token": token,
    }


def _head(tensors: dict[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    pairs = (("norm", layout.norm), ("linear", layout.head))
    return {f"{own}.{kind}": tensors[f"{path}.{kind}"] for own, path in pairs for kind in ("weight", "bias")}


def _block(tensors: dict[str, Tensor], block: str, layout: _Layout, shape: _Shape) -> dict[str, Tensor]:
    """A block's weights, heads and inner channels sorted by how much the projections behind them read of them."""

    def held(path: str) -> Tensor:
        return tensors[f"{block}.{path}"]

    (out, out_bias), (down, down_bias) = (
        _scaled(held(f"{path}.weight"), held(f"{path}.bias"), tensors.get(f"{block}.{scale}"))
        for path, scale in zip((layout.out, layout.down), layout.scales, strict=True)
    )
    rows = torch.arange(out.shape[1]).view(shape.heads, shape.head_width)
    rows = rows[_by_importance(out.abs().sum(0).view(shape.heads, -1).sum(1))].flatten()
    channels = _by_importance(down.abs().sum(0))
    made = {f"norm{i}.{kind}": held(f"{norm}.{kind}") for i, norm in enumerate(layout.norms, 1) for kind in _KINDS}
    for kind in _KINDS if shape.bias else _KINDS[:1]:
        for name, part in zip(("queries", "keys", "values"), held(f"{layout.fused}{kind}").chunk(3), strict=True):
            made[f"attention.{name}.{kind}"] = part[rows]
    return made | {
        "attention.out.weight": out[:, rows],
        "attention.out.bias": out_bias,
        "mlp.0.weight": held(f"{layout.up}.weight")[channels],
        "mlp.0.bias": held(f"{layout.up}.bias")[channels],
        "mlp.2.weight": down[:, channels],
        "mlp.2.bias": down_bias,
    }


_KINDS = ("weight", "bias")


def _scaled(weight: Tensor, bias: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    return (weight, bias) if factors is None else (factors[:, None] * weight, factors * bias)


def _by_importance(importance: Tensor) -> Tensor:
    return importance.argsort(descending=True, stable=True)


@torch.no_grad()
def _compare(
    module: nn.Module, supernet: Supernet, layout: _Layout, blocks: dict[str, str], image: tuple[int, int, int]
) -> None:
    """Refuse a source whose stem, a block or head computes something else than its names say."""
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    paths = {module.get_submodule(path): path for path in (*blocks.values(), layout.head)}

    def keep(part: nn.Module, inputs: Any, output: Any) -> None:
        taken[paths[part]], given[paths[part]] = inputs[0], output

    images = torch.randn(2, *image, generator=torch_rng("convert"))
    try:
        with hooked(paths, after=keep):
            module(images)
    except Exception as error:  # the source's own code, which may raise anything
        raise ValueError(f"the network cannot run on images of {image}: {str(error).splitlines()[0]}") from error
    layers = dict(supernet.space.blueprint(supernet.space.largest).named_layers())
    first = next(iter(blocks.values()))
    x = supernet.run("stem", layers["stem"], images)
    _check(f"what {first} is given", "the patches and their positions behind the class token", taken.get(first), x)
    for position, path in blocks.items():
        x = supernet.run(position, layers[position], x)
        what = "attention and two linear layers, each with its norm before it and added to its own input"
        _check(f"{path} ({type(module.get_submodule(path)).__name__})", what, given.get(path), x)
    head: Any = supernet.bank_module("head", layers["head"])
    _check(
        f"what {layout.head} is given",
        "the class token behind the last norm",
        taken.get(layout.head),
        head.norm(x[:, 0]),
    )


def _check(what: str, expected: str, source: Any, own: Tensor) -> None:
    if isinstance(source, Tensor) and source.shape == own.shape:
        difference = float((source - own).abs().max())
        if difference <= _TOLERANCE * max(1.0, float(source.abs().max())):
            return
        found = f"differs by {difference:.2g}"
    else:
        found = f"is a tensor {list(source.shape)}" if isinstance(source, Tensor) else f"is {type(source).__name__}"
    raise _refusal(f"{what} must be {expected}, and it {found}")


def _rows(
    parts: dict[str, nn.Module], tensors: dict[str, Tensor], layout: _Layout, blocks: list[str], space: ViT
) -> list[tuple[str, bool, str]]:
    rows = [(name, False, _STREAM) for name in (layout.patches, layout.class_token, layout.positions)]
    hidden = tuple(round(ratio * space.widths[0]) for ratio in space.ratios)
    for place, block in enumerate(blocks):
        dropped = ["may be left out (depth)"] if place >= space.depths[0] else []
        heads = _choice("heads", space.heads, f"layer{place}.heads")
        made, read = (_choice(f"channels {side}", hidden, f"layer{place}.ratio") for side in ("out", "in"))
        fused = layout.attention if layout.fused.startswith(f"{layout.attention}.in_") else layout.fused[:-1]
        narrowed = {fused: heads, layout.out: heads, layout.up: made, layout.down: read}
        narrowed |= dict.fromkeys(layout.norms, "")
        order = (layout.norms[0], fused, layout.out, layout.norms[1], layout.up, layout.down)
        for part in order:
            reasons = [*dropped, *filter(None, [narrowed[part]])]
            rows.append((f"{block}.{part}", bool(reasons), "; ".join(reasons) or _unchosen(part, layout, space)))
        for scale, path in zip(layout.scales, (layout.out, layout.down), strict=True):
            if f"{block}.{scale}" in tensors:
                reasons = [*dropped, f"its factors are multiplied into {block}.{path}"]
                rows.append((f"{block}.{scale.rpartition('.')[0]}", bool(dropped), "; ".join(reasons)))
    rows.append((layout.norm, False, _STREAM))
    rows.append((layout.head, False, "it reads the tokens' channels and makes the logits"))
    for path, part in parts.items():
        rate: Any = getattr(part, "p", 0) if isinstance(part, nn.Dropout) else getattr(part, "drop_prob", 0)
        rate = part.dropout if isinstance(part, nn.MultiheadAttention) else rate
        if rate:
            rows.append((f"{path} ({rate:g} dropped)", False, "it acts in training only, and no subnet has it"))
    return rows


def _choice(what: str, options: tuple[int, ...], name: str) -> str:
    return f"{what} {', '.join(map(str, options))} ({name})" if len(options) > 1 else ""


def _unchosen(part: str, layout: _Layout, space: ViT) -> str:
    if part in layout.norms:
        return _STREAM
    if part in (layout.up, layout.down):
        return f"{round(space.ratios[0] * space.widths[0])} channels in steps of {UNIT} leave nothing to choose"
    return "one head leaves nothing to choose"
