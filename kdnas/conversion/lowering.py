"""What each of PyTorch's operations is in the graph block."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdnas.conversion.axes import Factor, axis_size, channel_axis, reshaped, significant, with_channels
from kdnas.conversion.reader import Constant, Reader, View, single

Handler = Callable[..., Any]

_ACTIVATIONS = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "swish",
    "hardswish": "hswish",
    "sigmoid": "sigmoid",
    "hardsigmoid": "hsigmoid",
    "tanh": "tanh",
    "mish": "mish",
}


def _activation(name: str) -> Handler:
    return lambda reader, x, *rest: elementwise(reader, name, x)


def elementwise(reader: Reader, op: str, x: View, *values: Any, **weights: Constant) -> View:
    """An operation of each number, whatever the axes."""
    return View(reader.emit(op, (x.number,), values, **weights), x.axes)


def _gelu(reader: Reader, x: View, approximate: str) -> View:
    return elementwise(reader, "gelu" if approximate == "none" else "tanh_gelu", x)


def _elu(reader: Reader, x: View, alpha: float, scale: float, input_scale: float) -> View:
    if (scale, input_scale) != (1, 1):
        raise reader.refusal("a scaled ELU")
    return elementwise(reader, "elu", x, float(alpha))


def _softplus(reader: Reader, x: View, beta: float, threshold: float) -> View:
    return elementwise(reader, "softplus", x, float(beta), float(threshold))


def _clamp(reader: Reader, x: View, least: Any = None, most: Any = None) -> View:
    if least == 0 and most is None:
        return elementwise(reader, "relu", x)
    if (least, most) == (0, 6):
        return elementwise(reader, "relu6", x)
    if not (isinstance(least, int | float) and isinstance(most, int | float)):
        raise reader.refusal("clamping without two numbers as bounds")
    return elementwise(reader, "clamp", x, float(least), float(most))


def _prelu(reader: Reader, x: View, weight: Any) -> View:
    weight = reader.tensor(weight, "slope")
    count = weight.tensor.numel()
    if count > 1 and channel_axis(x.axes, x.channels) != 1:
        raise reader.refusal("PReLU on another axis than the channels")
    return elementwise(reader, "prelu", x, count, weight=weight)


def _dropout(reader: Reader, x: View, rate: float, training: bool) -> View:
    if training:
        raise reader.refusal("dropout that is active in evaluation mode")
    if not rate:
        return x
    return elementwise(reader, "drop_path" if reader.drops_paths() else "dropout", x, float(rate))


def _channel_dropout(reader: Reader, x: View, rate: float, training: bool) -> View:
    if training:
        raise reader.refusal("dropout that is active in evaluation mode")
    return reader.whole(reader.emit("channel_dropout", (reader.map(x),), (float(rate),))) if rate else x


def _conv(reader: Reader, x: View, weight: Any, bias: Any, *settings: Any) -> View:
    weight = reader.tensor(weight, "kernel")
    strides, padding, dilations, groups = settings
    kernels, dilations = _pair(weight.tensor.shape[2:]), _pair(dilations)
    spans = [dilation * (kernel - 1) for kernel, dilation in zip(kernels, dilations, strict=True)]
    if padding == "same" and not any(span % 2 for span in spans):
        padding = [span // 2 for span in spans]
    paddings = () if padding == "same" else _pair(0 if padding == "valid" else padding)
    stride = single(strides)
    if not paddings or stride is None or 2 * paddings[0] - spans[0] != 2 * paddings[1] - spans[1]:
        raise reader.refusal(
            f"a convolution of kernel {list(kernels)}, stride {list(_listed(strides))}, padding {settings[1]} and "
            f"dilation {list(dilations)}, whose output has another height than width,"
        )
    outputs, group = weight.tensor.shape[:2]
    sizes = [(kernel, pad, dilation) for kernel, pad, dilation in zip(kernels, paddings, dilations, strict=True)]
    (kernel, pad, dilation), across = sizes[0], (() if sizes[0] == sizes[1] else sizes[1])
    values = (group * groups, outputs, kernel, stride, pad, dilation, group if groups > 1 else 0, int(bias is not None))
    weights = {"weight": weight} | ({} if bias is None else {"bias": reader.tensor(bias, "bias")})
    return reader.whole(reader.emit("conv", (reader.map(x),), (*values, *across), **weights))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _pair(value: Any) -> tuple[int, int]:
    """Height and width, of a pair or of one number for both."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers[0], numbers[-1]


def _linear(reader: Reader, x: View, weight: Any, bias: Any) -> View:
    weight = reader.tensor(weight, "weight")
    outputs, inputs = weight.tensor.shape
    weights = {"weight": weight} | ({} if bias is None else {"bias": reader.tensor(bias, "bias")})
    settings = (inputs, outputs, int(bias is not None))
    if len(x.axes) == 2:
        return reader.whole(reader.emit("linear", (reader.vector(x),), settings, **weights))
    if channel_axis(x.axes, x.channels) != len(x.axes) - 1:
        raise reader.refusal("a linear layer on another axis than the channels")
    if reader.is_map(x):  # a convolution of single positions
        kernel = Constant(weight.tensor[:, :, None, None], weight.origins, weight.learned, weight.name)
        values = (inputs, outputs, 1, 1, 0, 1, 0, settings[2])
        number = reader.emit("conv", (x.number,), values, **(weights | {"weight": kernel}))
    else:
        number = reader.emit("linear", (x.number,), settings, **weights)
    return View(number, with_channels(x.axes, outputs))


def _addmm(reader: Reader, bias: Any, x: Any, weight: Any, beta: float, alpha: float) -> View:
    if (beta, alpha) != (1, 1) or not isinstance(x, View):
        raise reader.refusal("a product of matrices")
    weight = reader.tensor(weight, "matrix")
    turned = Constant(weight.tensor.T, weight.origins, weight.learned)
    return _linear(reader, x, turned, bias)


def _matmul(reader: Reader, x: Any, weight: Any) -> View:
    if not isinstance(x, View) or not isinstance(weight, Constant) or weight.tensor.dim() != 2:
        raise reader.refusal("a product of two tensors that depend on the images, as in attention,")
    return _linear(reader, x, Constant(weight.tensor.T, weight.origins, weight.learned), None)


def _affine(reader: Reader, weight: Any, bias: Any, channels: int) -> dict[str, Constant]:
    """Weight and bias of a norm; where it has none, ones and zeros."""
    return {
        "weight": Constant(torch.ones(channels)) if weight is None else reader.tensor(weight, "weight"),
        "bias": Constant(torch.zeros(channels)) if bias is None else reader.tensor(bias, "bias"),
    }


def _batch_norm(
    reader: Reader,
    x: View,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: Any,
    momentum: float,
    eps: float,
    *_: Any,
) -> View:
    if training or mean is None:
        raise reader.refusal("a norm by the statistics of the batch, in evaluation mode too,")
    if reader.accumulates():
        raise reader.refusal("a batch norm with the average of all batches (momentum=None)")
    weights = _affine(reader, weight, bias, x.channels)
    weights |= {"running_mean": reader.tensor(mean, "mean"), "running_var": reader.tensor(var, "variance")}
    op = "norm" if len(x.axes) == 4 else "vector_norm"
    return reader.whole(reader.emit(op, (reader.plain(x),), (x.channels, eps, momentum), **weights))


def _group_norm(reader: Reader, x: View, groups: int, weight: Any, bias: Any, eps: float, *_: Any) -> View:
    weights = _affine(reader, weight, bias, x.channels)
    return reader.whole(reader.emit("group_norm", (reader.map(x),), (x.channels, x.channels // groups, eps), **weights))


def _instance_norm(
    reader: Reader,
    x: View,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    by_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> View:
    if not by_input:
        return _batch_norm(reader, x, weight, bias, mean, var, False, momentum, eps)
    return _group_norm(reader, x, x.channels, weight, bias, eps)


def _layer_norm(reader: Reader, x: View, shape: Sequence[int], weight: Any, bias: Any, eps: float, *_: Any) -> View:
    weights = _affine(reader, weight, bias, x.channels)
    if len(shape) == 1 and len(x.axes) == 2:
        return reader.whole(reader.emit("layer_norm", (reader.vector(x),), (x.channels, eps), **weights))
    if len(shape) > 1 or channel_axis(x.axes, x.channels) != len(x.axes) - 1:
        raise reader.refusal(f"a layer norm over other axes than the channels ({list(shape)})")
    return elementwise(reader, "layer_norm", x, x.channels, eps, **weights)


def _max_pool(
    reader: Reader, x: View, kernel: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> View:
    sides = [single(v) for v in (kernel, stride or kernel, padding)]
    if None in sides or single(dilation) != 1:
        raise reader.refusal("a maximum of windows that are not square, or have gaps,")
    number = reader.map(x)
    if reader.is_whole_window(sides, number):
        return reader.whole(reader.emit("highest", (number,), (1,)))
    return reader.whole(reader.emit("max_pool", (number,), (*sides, *[1] * bool(ceil))))


def _avg_pool(
    reader: Reader, x: View, kernel: Any, stride: Any, padding: Any, ceil: bool, counted: bool, divisor: Any
) -> View:
    sides = [single(v) for v in (kernel, stride or kernel, padding)]
    if None in sides or divisor is not None:
        raise reader.refusal("an average of windows that are not square, or by another divisor,")
    number = reader.map(x)
    if reader.is_whole_window(sides, number):
        return reader.whole(reader.emit("pool", (number,), (1,)))
    more = (int(ceil), int(counted)) if ceil or (sides[2] and not counted) else ()
    return reader.whole(reader.emit("avg_pool", (number,), (*sides, *more)))


def _adaptive(op: str) -> Handler:
    def handler(reader: Reader, x: View, size: Any) -> Any:
        side = single(size)
        if not side:
            raise reader.refusal(f"pooling to {size}, which is not square,")
        return reader.whole(reader.emit(op, (reader.map(x),), (side,)))

    return handler


def _upsample(mode: int) -> Handler:
    """A resize by a whole factor: 0 for the nearest position, 1 for bilinear, 2 for bilinear with aligned corners.

    Of a network for every pixel it is noted with its size, whose origin `kdnas.conversion.trace` looks for.
    """

    def handler(reader: Reader, x: View, size: Any, *rest: Any) -> View:
        number, (_, _, height, width) = reader.map(x), reader.output().shape
        side = reader.traced[number].shape[2]
        if reader.dense and height == width:
            return reader.whole(reader.emit("resize", (number,), (2 if mode and rest[0] else mode, height)))
        if height != width or height % side:
            raise reader.refusal(f"a resize from {side} x {side} to {height} x {width}, by no whole factor,")
        kind = 2 if mode and rest[0] else mode
        return reader.whole(reader.emit("upsample", (number,), (height // side, kind)))

    return handler


def _first(handler: Handler) -> Handler:
    """Of an operation with several outputs only the first."""
    return lambda reader, *arguments: [handler(reader, *arguments), None]


def _over_positions(reader: Reader, op: str, x: View, dims: Any, keep: bool) -> View:
    """A mean or maximum over all positions."""
    axes = {dim % len(x.axes) for dim in _listed(dims)} if dims is not None else set()
    letters = {factor.dim for index in axes for factor in x.axes[index]}
    left = [factor.dim for index, axis in enumerate(x.axes) if index not in axes for factor in axis]
    if letters != {"H", "W"} or not {"H", "W"}.isdisjoint(left):
        raise reader.refusal(f"a {'mean' if op == 'pool' else 'maximum'} over other axes than height and width")
    if keep:
        return View(
            reader.emit(op, (x.number,), (1,)), tuple(_unit(a) if i in axes else a for i, a in enumerate(x.axes))
        )
    others = tuple(axis for index, axis in enumerate(x.axes) if index not in axes)
    if op == "pool":
        return View(reader.emit("mean", (x.number,)), others)
    return View(reader.emit("flatten", (reader.emit(op, (x.number,), (1,)),)), others)


def _unit(axis: Sequence[Factor]) -> tuple[Factor, ...]:
    return tuple(Factor(factor.dim, 1) for factor in axis)


def _mean(reader: Reader, x: View, dims: Any = None, keep: bool = False, dtype: Any = None) -> View:
    return _over_positions(reader, "pool", x, dims, keep)


def _amax(reader: Reader, x: View, dims: Any = (), keep: bool = False) -> View:
    return _over_positions(reader, "highest", x, dims, keep)


def _pad(reader: Reader, x: View, padding: Sequence[int], *rest: Any) -> View:
    mode, value = rest if len(rest) == 2 else ("constant", *rest)
    padding = [*padding, *[0] * (4 - len(padding))]
    if len(padding) > 4 and not any(padding[4:]):
        padding = padding[:4]
    if not any(padding):
        return x
    left, right, top, bottom = padding if len(padding) == 4 else (0, 1, 0, 0)
    if mode != "constant" or value not in (None, 0) or left + right != top + bottom or min(padding) < 0:
        raise reader.refusal("padding by other values than zeros, or by different amounts in height and width,")
    return reader.whole(reader.emit("pad", (reader.map(x),), padding))


def _add(reader: Reader, x: Any, y: Any, alpha: float = 1) -> View:
    return _sum(reader, x, y, alpha)


def _sub(reader: Reader, x: Any, y: Any, alpha: float = 1) -> View:
    return _sum(reader, x, y, -alpha)


def _rsub(reader: Reader, x: Any, y: Any, alpha: float = 1) -> View:
    return _sum(reader, y, x, -alpha)


def _sum(reader: Reader, x: Any, y: Any, factor: float) -> View:
    """The sum of the first and `factor` times the second."""
    if factor != 1:
        y = scaled(reader, y, factor)
    if isinstance(x, View) and isinstance(y, View):
        return _joined(reader, "add", x, y)
    return _with_constant(reader, "shift", x, y) if isinstance(x, View) else _with_constant(reader, "shift", y, x)


def scaled(reader: Reader, x: Any, factor: float) -> Any:
    """The tensor or number times a number."""
    if isinstance(x, View):
        return elementwise(reader, "times", x, float(factor))
    return Constant(x.tensor * factor, x.origins, x.learned) if isinstance(x, Constant) else x * factor


def _mul(reader: Reader, x: Any, y: Any) -> View:
    if isinstance(x, View) and isinstance(y, View):
        return _joined(reader, "mul", x, y)
    return _with_constant(reader, "scale", x, y) if isinstance(x, View) else _with_constant(reader, "scale", y, x)


def _div(reader: Reader, x: Any, y: Any, *mode: Any) -> View:
    if isinstance(y, View) or not isinstance(x, View) or any(mode):
        raise reader.refusal("a division by a tensor that depends on the images, or with rounding,")
    inverse = Constant(1 / y.tensor, y.origins, y.learned) if isinstance(y, Constant) else 1 / y
    return _with_constant(reader, "scale", x, inverse)


def _neg(reader: Reader, x: View) -> View:
    return scaled(reader, x, -1.0)


def _pow(reader: Reader, x: Any, exponent: Any = 2) -> View:
    if exponent != 2 or not isinstance(x, View):
        raise reader.refusal(f"the power {exponent}")
    return _joined(reader, "mul", x, x)


def _with_constant(reader: Reader, op: str, x: View, constant: Any) -> View:
    """A tensor times (`scale`) or plus (`shift`) a number, or numbers per channel."""
    if isinstance(constant, int | float):
        if constant == (op == "scale"):
            return x
        return elementwise(reader, {"scale": "times", "shift": "plus"}[op], x, float(constant))
    if not isinstance(constant, Constant) or not constant.tensor.is_floating_point():
        raise reader.refusal("a product or sum with a tensor that is not floating point")
    if constant.tensor.numel() == 1:
        single = constant.tensor.reshape(())
        if not constant.learned:
            return _with_constant(reader, op, x, float(single))
        weight = Constant(single, constant.origins, True, constant.name)
        return elementwise(reader, op, x, 0, 1, weight=weight)
    shape = (*[1] * (len(x.axes) - constant.tensor.dim()), *constant.tensor.shape)
    axis = channel_axis(x.axes, x.channels)
    if axis is None or len(shape) != len(x.axes) or shape[axis] != constant.tensor.numel() or shape[axis] != x.channels:
        raise reader.refusal(
            f"a product or sum with a tensor of shape {list(constant.tensor.shape)}, not one number per channel,"
        )
    weight = Constant(constant.tensor.flatten(), constant.origins, constant.learned, constant.name)
    return elementwise(reader, op, x, x.channels, int(constant.learned), weight=weight)


def _joined(reader: Reader, op: str, x: View, y: View) -> View:
    """The sum or product of two tensors that depend on the images, one of which may be broadcast."""
    if len(x.axes) != len(y.axes):
        raise reader.refusal("a sum or product of tensors with different numbers of axes")
    first, second = significant(x.axes), significant(y.axes)
    if any(a != b and a and b for a, b in zip(first, second, strict=True)):
        return reader.whole(reader.emit(op, (reader.plain(x), reader.plain(y))))
    if reader.is_map(x) != reader.is_map(y):
        x, y = (view if reader.is_map(view) else reader.expanded(view) for view in (x, y))
    number = reader.emit(op, (x.number, y.number))
    return View(
        number,
        tuple(max(a, b, key=lambda axis: (axis_size(axis), len(axis))) for a, b in zip(x.axes, y.axes, strict=True)),
    )


def _cat(reader: Reader, tensors: Sequence[Any], dim: int = 0) -> View:
    if not all(isinstance(t, View) for t in tensors):
        raise reader.refusal("a concatenation with a tensor that does not depend on the images")
    if len(tensors) == 1:
        return tensors[0]
    dim %= len(tensors[0].axes)
    if dim == 1:
        return reader.whole(reader.emit("cat", [reader.plain(t) for t in tensors]))
    others = {significant((*t.axes[:dim], *t.axes[dim + 1 :])) for t in tensors}
    if len(others) > 1 or any(channel_axis(t.axes, t.channels) != dim or not reader.is_map(t) for t in tensors):
        raise reader.refusal("a concatenation along another axis than the channels")
    number = reader.emit("cat", [t.number for t in tensors])
    return View(number, with_channels(tensors[0].axes, sum(t.channels for t in tensors)))


def _slice(reader: Reader, x: View, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> View:
    dim %= len(x.axes)
    first, last, _ = slice(start, end).indices(axis_size(x.axes[dim]))
    if (first, last, step) == (0, axis_size(x.axes[dim]), 1):
        return x
    return _channels_from(reader, x, dim, first, last - first) if step == 1 else _refuse_part(reader)


def _refuse_part(reader: Reader) -> View:
    raise reader.refusal("a part of a tensor along another axis than the channels, or with gaps,")


def _channels_from(reader: Reader, x: View, dim: int, first: int, count: int) -> View:
    if dim == 1:
        x = reader.whole(reader.plain(x))
    if channel_axis(x.axes, x.channels) != dim or count < 1:
        _refuse_part(reader)
    number = reader.emit("slice", (x.number,), (first, count))
    return View(number, with_channels(x.axes, count))


def _shuffle(reader: Reader, x: View, groups: int) -> View:
    return reader.whole(reader.emit("shuffle", (reader.map(x),), (groups,)))


def _narrow(reader: Reader, x: View, dim: int, start: int, length: int) -> View:
    return _slice(reader, x, dim, start, start + length)


def _split(reader: Reader, x: View, sizes: Any, dim: int = 0) -> list[View]:
    total = axis_size(x.axes[dim])
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_slice(reader, x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _chunk(reader: Reader, x: View, chunks: int, dim: int = 0) -> list[View]:
    return _split(reader, x, math.ceil(axis_size(x.axes[dim]) / chunks), dim)


def _select(reader: Reader, x: View, dim: int, index: int) -> View:
    dim %= len(x.axes)
    if axis_size(x.axes[dim]) != 1:
        _refuse_part(reader)
    return View(x.number, (*x.axes[:dim], *x.axes[dim + 1 :]))


def _same(reader: Reader, x: View, *rest: Any) -> View:
    return x


def _converted(reader: Reader, x: View, *rest: Any) -> View:
    if reader.output().dtype != torch.float32:
        raise reader.refusal(f"a change of the type of numbers to {reader.output().dtype}")
    return x


def _reshaped(reader: Reader, x: View, *rest: Any) -> View:
    axes = reshaped(x.axes, reader.output().shape)
    if axes is None:
        raise reader.refusal(f"a view of shape {list(reader.output().shape)} that mixes channels and positions")
    return View(x.number, axes)


def _unsqueeze(reader: Reader, x: View, dim: int) -> View:
    dim %= len(x.axes) + 1
    return View(x.number, (*x.axes[:dim], (), *x.axes[dim:]))


def _squeeze(reader: Reader, x: View, dims: Any = None) -> View:
    gone = {d % len(x.axes) for d in (range(len(x.axes)) if dims is None else _listed(dims))}
    return View(x.number, tuple(a for i, a in enumerate(x.axes) if i not in gone or axis_size(a) > 1))


def _permute(reader: Reader, x: View, dims: Sequence[int]) -> View:
    return View(x.number, tuple(x.axes[dim] for dim in dims))


def _transpose(reader: Reader, x: View, first: int, second: int) -> View:
    axes = list(x.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return View(x.number, tuple(axes))


def _movedim(reader: Reader, x: View, source: Any, target: Any) -> View:
    order = torch.empty([index + 1 for index in range(len(x.axes))], device="meta").movedim(source, target).shape
    return View(x.number, tuple(x.axes[size - 1] for size in order))


HANDLERS: dict[str, Handler] = {
    **{name: _activation(op) for name, op in _ACTIVATIONS.items()},
    "gelu": _gelu,
    "elu": _elu,
    "leaky_relu": lambda reader, x, slope: elementwise(reader, "leaky_relu", x, float(slope)),
    "softplus": _softplus,
    **dict.fromkeys(("clamp", "clip", "hardtanh"), _clamp),
    "clamp_min": _clamp,
    "prelu": _prelu,
    "dropout": _dropout,
    "feature_dropout": _channel_dropout,
    "alpha_dropout": _dropout,
    "conv2d": _conv,
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm"), _matmul),
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _first(
        lambda reader, x, weight, bias, mean, var, *rest: _batch_norm(reader, x, weight, bias, mean, var, False, *rest)
    ),
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _first(_max_pool),
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive("pool"),
    "adaptive_max_pool2d": _first(_adaptive("highest")),
    "upsample_nearest2d": _upsample(0),
    "upsample_bilinear2d": _upsample(1),
    "mean": _mean,
    "amax": _amax,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": _rsub,
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    "neg": _neg,
    **dict.fromkeys(("pow", "square"), _pow),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "channel_shuffle": _shuffle,
    "slice": _slice,
    "narrow": _narrow,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "chunk": _chunk,
    "select": _select,
    **dict.fromkeys(("clone", "alias", "contiguous", "detach", "expand", "expand_as"), _same),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float"), _converted),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), _reshaped),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "movedim": _movedim,
}
"""By the name of an operation of PyTorch: a function of the reader and the operation's arguments."""
