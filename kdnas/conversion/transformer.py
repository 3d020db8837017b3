"""A plain vision transformer as a supernet with its weights."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.conversion.base import Conversion, ModuleReport, compare
from kdnas.network import hooked
from kdnas.plain import reason
from kdnas.randomness import torch_rng
from kdnas.spaces.converted import UNIT, narrower
from kdnas.spaces.vit import ViT
from kdnas.supernet import Supernet

# Ten times the tolerance of the logits: rounding adds up over the blocks, and another kind of block is far off.
_TOLERANCE = 1e-4
_STREAM = "its channels are the tokens'; a layer norm over some of them would be another function than the source's"


@final
@dataclass(frozen=True)
class _ModulePaths:
    """Names of a vision transformer's modules and tensors; those of a block are relative to the block."""

    kind: str
    patches: str
    class_token: str
    positions: str
    blocks: str
    norm: str
    head: str
    norms: tuple[str, str]
    attention: str
    fused: str  # prefix of the joint weight and bias of queries, keys and values
    out: str
    up: str
    activation: str
    down: str
    scales: tuple[str, str]  # learned factors of the two branches, where they exist

    def expected(self, blocks: list[str]) -> tuple[set[str], set[str]]:
        """Names of the tensors that a plain transformer must have, and of those it may have."""
        needed = {self.class_token, self.positions}
        layers = [self.patches, self.norm, self.head]
        allowed: set[str] = set()
        for block in blocks:
            layers += [f"{block}.{part}" for part in (*self.norms, self.out, self.up, self.down)]
            needed.add(f"{block}.{self.fused}weight")
            allowed |= {f"{block}.{self.fused}bias", *(f"{block}.{scale}" for scale in self.scales)}
        return needed | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}, allowed


_KNOWN_PATHS = (
    _ModulePaths(
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
    _ModulePaths(
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
# Part of a tensor's name, and what such a tensor belongs to.
_OTHERS = {
    "dist_token": "a distillation token with a head of its own",
    "reg_token": "register tokens",
    "q_norm": "normalised queries and keys",
    "k_norm": "normalised queries and keys",
    "bias_k": "an additional key and value",
    "bias_v": "an additional key and value",
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "norm_pre": "a norm before the blocks",
    "fc_norm": "a head on pooled tokens instead of the class token",
    "attn_pool": "a head with attention pooling",
    "pre_logits": "a hidden layer before the classifier",
    "patch_embed": "a stem that is more than one convolution",
    "conv_proj": "a stem that is more than one convolution",
}
_PLAIN = (
    "Only plain vision transformers with the module names of torchvision's or timm's VisionTransformer can be "
    "converted: one convolution of patches, a class token, learned absolute positions, blocks with a layer norm before "
    "each branch, GELU, and a linear classifier on the class token."
)


class _Dimensions(NamedTuple):
    """The sizes of a recognised transformer."""

    patch: int
    side: int
    width: int
    heads: int
    head_width: int
    hidden: int
    eps: float
    bias: bool
    classes: int


def transformer(module: nn.Module, image: tuple[int, int, int], name: str, divisor: int = 0) -> Conversion | None:
    r"""A plain vision transformer as a supernet, or None for a network without attention.

    The space is one of `kdnas.spaces.vit`. *Depth*: the last blocks may be left out, at most a half. *Heads* of each
    block: a half, three quarters or all. *Inner width* of each block: likewise, in multiples of 8. The tokens' width
    is fixed, since a layer norm over some channels is another function than the source's. Heads, and channels
    between the two linear layers, are sorted by importance, the sum of the absolute weights with which the
    projection after them reads them ($\sum |W_{:,c}|$), so that the leading ones matter most; the outputs of the full
    network do not change, except for the order of floating point additions.

    A class token and its position, which are only added, become one vector. Learned factors of a branch (LayerScale)
    are multiplied into its last projection, exactly: $\gamma (W x + b) = (\gamma W) x + \gamma b$. The parts are then
    compared with the source's, one by one, on random images.

    Args:
        module: in evaluation mode.
        image: channels, height and width, which are equal.
        name: of the space.
        divisor: narrower inner widths are multiples of it; 0 for 8.

    Raises:
        ValueError: a network with attention that is not a plain vision transformer, or is for other images.

    References: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; Michel, Levy, Neubig, Are Sixteen Heads
        Really Better than One?, NeurIPS 2019, whose gradient-based importance needs data; the sum of absolute weights
        is that of Cai et al., Once-for-All, ICLR 2020, section 3.3, which needs none.
    """
    parts = dict(module.named_modules())
    attention = next((path for path, part in parts.items() if hasattr(part, "num_heads")), None)
    if attention is None:
        return None
    for names in _KNOWN_PATHS:
        if {names.blocks, names.patches.partition(".")[0]} <= parts.keys():
            break
    else:
        raise _refusal(
            f"{attention} ({type(parts[attention]).__name__}) is attention in a network with other module names, or "
            "with other parts beside a transformer"
        )
    blocks = [f"{names.blocks}.{child}" for child, _ in parts[names.blocks].named_children()]
    tensors = {n: t.detach() for n, t in module.named_parameters(remove_duplicate=False)}
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    _check_names(module, tensors, names, blocks)
    sizes = _sizes(parts, tensors, names, blocks, image)
    least = math.ceil(len(blocks) / 2)
    space = ViT(
        name=name,
        source="kdnas convert",
        classes=sizes.classes,
        image_channels=image[0],
        resolutions=(image[1],),
        patch=sizes.patch,
        widths=(sizes.width,),
        depths=tuple(range(least, len(blocks) + 1)),
        heads=narrower(sizes.heads, 1),
        ratios=tuple(option / sizes.width for option in narrower(sizes.hidden, divisor or UNIT)),
        head_width=sizes.head_width,
        reach=0,
        cuts=tuple(sorted({least // 3, 2 * least // 3} - {0})),
        drop_path=0.0,
        pool="class",
        norm_eps=sizes.eps,
        qkv_bias=sizes.bias,
    )
    supernet = Supernet(space).eval()
    layers = dict(space.blueprint(space.largest).named_layers())
    positions = [position for position in layers if position.startswith("stages")]
    weights = {"stem": _stem(tensors, names, sizes), "head": _head(tensors, names)}
    weights |= {p: _block(tensors, b, names, sizes) for p, b in zip(positions, blocks, strict=True)}
    for position, state in weights.items():
        try:
            supernet.bank_module(position, layers[position]).load_state_dict(state)
        except RuntimeError as error:
            raise _refusal(f"{position} has weights of other shapes: {str(error).splitlines()[-1].strip()}") from error
    _compare(module, supernet, names, dict(zip(positions, blocks, strict=True)), image)
    report = tuple(ModuleReport(*row) for row in _rows(parts, tensors, names, blocks, space))
    return Conversion(space, supernet, report, compare(module, supernet))


def _refusal(what: str) -> ValueError:
    return ValueError(f"{what}. {_PLAIN}")


def _check_names(module: nn.Module, tensors: dict[str, Tensor], names: _ModulePaths, blocks: list[str]) -> None:
    """Refuse a network with more or fewer tensors than a plain transformer."""
    pool = getattr(module, "global_pool", "token")
    if pool != "token":
        raise _refusal(f"the head pools the tokens (global_pool={pool!r}) instead of the class token")
    if not blocks:
        raise _refusal(f"{names.blocks} is empty")
    needed, allowed = names.expected(blocks)
    for name in tensors:
        if name not in needed | allowed:
            owner = next((owner for key, owner in _OTHERS.items() if key in name), "")
            raise _refusal(f"{name} is not part of a plain vision transformer{': it belongs to ' * bool(owner)}{owner}")
    for name in sorted(needed - tensors.keys()):
        raise _refusal(f"the tensor {name} of {names.kind} is missing")


def _grid(
    parts: dict[str, nn.Module], tensors: dict[str, Tensor], names: _ModulePaths, image: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Size of a patch, patches per side, and width of a token.

    Raises:
        ValueError: the stem is not a convolution of patches, or is for other images.
    """
    stem: Any = parts[names.patches]
    patch = stem.kernel_size[0] if isinstance(stem, nn.Conv2d) else 0
    if not patch or [stem.kernel_size, stem.stride, stem.padding, stem.dilation, stem.groups] != [
        (patch, patch),
        (patch, patch),
        (0, 0),
        (1, 1),
        1,
    ]:
        raise _refusal(f"{names.patches} must be a convolution of square, adjacent patches, it is {stem}")
    if stem.in_channels != image[0]:
        raise ValueError(f"images must have {stem.in_channels} channels for this network, got {image[0]}.")
    width, side = stem.out_channels, image[1] // patch
    tokens = tensors[names.positions].numel() // width
    for name, expected in ((names.class_token, (1, 1, width)), (names.positions, (1, tokens, width))):
        if tensors[name].shape != expected:
            raise _refusal(f"{name} must have the shape {expected}, got {tuple(tensors[name].shape)}")
    if tokens - side * side not in (0, 1) or image[1] % patch:
        own = math.isqrt(tokens)
        raise ValueError(
            f"{names.positions} has {tokens} positions, for {own} x {own} patches and a class token, but "
            f"images of {image[1]} x {image[1]} have {image[1] / patch:g} x {image[1] / patch:g} patches. Use the "
            f"network's own image size, {own * patch}."
        )
    return patch, side, width


def _sizes(
    parts: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    names: _ModulePaths,
    blocks: list[str],
    image: tuple[int, int, int],
) -> _Dimensions:
    """The sizes of a plain transformer with equal blocks.

    Raises:
        ValueError: the blocks differ, or another kind of layer is in them.
    """
    patch, side, width = _grid(parts, tensors, names, image)
    norms = [names.norm, *(f"{block}.{norm}" for block in blocks for norm in names.norms)]
    eps: set[float] = set()
    for norm in norms:
        part = parts[norm]
        if not isinstance(part, nn.LayerNorm):
            raise _refusal(f"{norm} must be a layer norm, it is a {type(part).__name__}")
        eps.add(part.eps)
    inner = tensors[f"{blocks[0]}.{names.out}.weight"].shape[1]
    shapes = []
    for block in blocks:
        activation = parts.get(f"{block}.{names.activation}", nn.Identity())
        if not _is_gelu(activation):
            raise _refusal(f"{block}.{names.activation} must be exact GELU, it is a {type(activation).__name__}")
        heads: Any = getattr(parts[f"{block}.{names.attention}"], "num_heads", 1)
        hidden, read = (
            tensors[f"{block}.{names.up}.weight"].shape[0],
            tensors[f"{block}.{names.down}.weight"].shape[1],
        )
        if hidden != read:
            raise _refusal(
                f"{block}.{names.up} has {hidden} output channels, but {block}.{names.down} {read} input channels"
            )
        shapes.append((heads, hidden, f"{block}.{names.fused}bias" in tensors))
        fused = tensors[f"{block}.{names.fused}weight"].shape
        if tuple(fused) != (3 * inner, width) or inner % heads:
            raise _refusal(
                f"{block}.{names.fused}weight must be queries, keys and values of {heads} heads, {inner} rows each, "
                f"for {width} channels, got shape {tuple(fused)}"
            )
    for what, values in (("heads, inner widths and biases", set(shapes)), ("layer norms' eps", eps)):
        if len(values) > 1:
            raise _refusal(f"all blocks must have the same {what}, got {sorted(values)}")
    heads, hidden, bias = shapes[0]
    classes = tensors[f"{names.head}.weight"].shape[0]
    return _Dimensions(patch, side, width, heads, inner // heads, hidden, eps.pop(), bias, classes)


def _is_gelu(activation: nn.Module) -> bool:
    values = torch.linspace(-4, 4, 101)
    with torch.no_grad():
        return torch.allclose(activation(values.clone()), F.gelu(values), rtol=0, atol=1e-6)


def _stem(tensors: dict[str, Tensor], names: _ModulePaths, sizes: _Dimensions) -> dict[str, Tensor]:
    positions, token = tensors[names.positions][0], tensors[names.class_token].flatten()
    places = sizes.side * sizes.side
    if len(positions) > places:
        token, positions = token + positions[0], positions[1:]
    return {
        "patches.weight": tensors[f"{names.patches}.weight"],
        "patches.bias": tensors[f"{names.patches}.bias"],
        "positions": positions.T.reshape(1, sizes.width, sizes.side, sizes.side),
        "class_token": token,
    }


def _head(tensors: dict[str, Tensor], names: _ModulePaths) -> dict[str, Tensor]:
    pairs = (("norm", names.norm), ("linear", names.head))
    return {f"{own}.{kind}": tensors[f"{path}.{kind}"] for own, path in pairs for kind in ("weight", "bias")}


def _block(tensors: dict[str, Tensor], block: str, names: _ModulePaths, sizes: _Dimensions) -> dict[str, Tensor]:
    """A block's weights, heads and inner channels sorted by their importance to the projections that read them."""

    def tensor(path: str) -> Tensor:
        return tensors[f"{block}.{path}"]

    (out, out_bias), (down, down_bias) = (
        _scaled(tensor(f"{path}.weight"), tensor(f"{path}.bias"), tensors.get(f"{block}.{scale}"))
        for path, scale in zip((names.out, names.down), names.scales, strict=True)
    )
    rows = torch.arange(out.shape[1]).view(sizes.heads, sizes.head_width)
    rows = rows[_by_importance(out.abs().sum(0).view(sizes.heads, -1).sum(1))].flatten()
    channels = _by_importance(down.abs().sum(0))
    state = {f"norm{i}.{kind}": tensor(f"{norm}.{kind}") for i, norm in enumerate(names.norms, 1) for kind in _KINDS}
    for kind in _KINDS if sizes.bias else _KINDS[:1]:
        for name, part in zip(("queries", "keys", "values"), tensor(f"{names.fused}{kind}").chunk(3), strict=True):
            state[f"attention.{name}.{kind}"] = part[rows]
    return state | {
        "attention.out.weight": out[:, rows],
        "attention.out.bias": out_bias,
        "mlp.0.weight": tensor(f"{names.up}.weight")[channels],
        "mlp.0.bias": tensor(f"{names.up}.bias")[channels],
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
    module: nn.Module, supernet: Supernet, names: _ModulePaths, blocks: dict[str, str], image: tuple[int, int, int]
) -> None:
    """Refuse a source whose stem, a block or head computes something else than its module names suggest."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    paths = {module.get_submodule(path): path for path in (*blocks.values(), names.head)}

    def record(part: nn.Module, arguments: Any, output: Any) -> None:
        inputs[paths[part]], outputs[paths[part]] = arguments[0], output

    images = torch.randn(2, *image, generator=torch_rng("convert"))
    try:
        with hooked(paths, after=record):
            module(images)
    except Exception as error:  # the source's own code, which may raise anything
        raise ValueError(f"the network cannot run on images of {image}: {reason(error)}.") from error
    layers = dict(supernet.space.blueprint(supernet.space.largest).named_layers())
    first = next(iter(blocks.values()))
    x = supernet.run("stem", layers["stem"], images)
    _check(f"the input of {first}", "the class token, then the patches with their positions", inputs.get(first), x)
    for position, path in blocks.items():
        x = supernet.run(position, layers[position], x)
        expected = "attention and two linear layers, each with a layer norm before it and a shortcut around it"
        _check(f"{path} ({type(module.get_submodule(path)).__name__})", expected, outputs.get(path), x)
    head: Any = supernet.bank_module("head", layers["head"])
    _check(f"the input of {names.head}", "the normalised class token", inputs.get(names.head), head.norm(x[:, 0]))


def _check(what: str, expected: str, source: Any, own: Tensor) -> None:
    if isinstance(source, Tensor) and source.shape == own.shape:
        difference = float((source - own).abs().max())
        if difference <= _TOLERANCE * max(1.0, float(source.abs().max())):
            return
        deviation = f"it differs by {difference:.2g}"
    else:
        kind = f"a tensor {list(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        deviation = f"it is {kind}"
    raise _refusal(f"{what} must be {expected}, {deviation}")


def _rows(
    parts: dict[str, nn.Module], tensors: dict[str, Tensor], names: _ModulePaths, blocks: list[str], space: ViT
) -> list[tuple[str, bool, str]]:
    rows = [(name, False, _STREAM) for name in (names.patches, names.class_token, names.positions)]
    hidden = tuple(round(ratio * space.widths[0]) for ratio in space.ratios)
    for place, block in enumerate(blocks):
        dropped = ["may be left out (depth)"] if place >= space.depths[0] else []
        heads = _choice("heads", space.heads, f"layer{place}.heads")
        outputs, inputs = (_choice(f"channels {side}", hidden, f"layer{place}.ratio") for side in ("out", "in"))
        fused = names.attention if names.fused.startswith(f"{names.attention}.in_") else names.fused[:-1]
        narrowed = {fused: heads, names.out: heads, names.up: outputs, names.down: inputs}
        narrowed |= dict.fromkeys(names.norms, "")
        order = (names.norms[0], fused, names.out, names.norms[1], names.up, names.down)
        for part in order:
            reasons = [*dropped, *filter(None, [narrowed[part]])]
            rows.append((f"{block}.{part}", bool(reasons), "; ".join(reasons) or _unchosen(part, names, space)))
        for scale, path in zip(names.scales, (names.out, names.down), strict=True):
            if f"{block}.{scale}" in tensors:
                reasons = [*dropped, f"its factors are multiplied into {block}.{path}"]
                rows.append((f"{block}.{scale.rpartition('.')[0]}", bool(dropped), "; ".join(reasons)))
    rows.append((names.norm, False, _STREAM))
    rows.append((names.head, False, "its inputs are the tokens' channels, its outputs the logits"))
    for path, part in parts.items():
        rate: Any = getattr(part, "p", 0) if isinstance(part, nn.Dropout) else getattr(part, "drop_prob", 0)
        rate = part.dropout if isinstance(part, nn.MultiheadAttention) else rate
        if rate:
            rows.append((f"{path} ({rate:g} dropped)", False, "it is active in training only; no subnet has it"))
    return rows


def _choice(what: str, options: tuple[int, ...], name: str) -> str:
    return f"{what} {', '.join(map(str, options))} ({name})" if len(options) > 1 else ""


def _unchosen(part: str, names: _ModulePaths, space: ViT) -> str:
    if part in names.norms:
        return _STREAM
    if part in (names.up, names.down):
        return f"{round(space.ratios[0] * space.widths[0])} channels in steps of {UNIT} leave nothing to choose"
    return "one head leaves nothing to choose"
