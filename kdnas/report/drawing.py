"""A network as a drawing: one box per layer, in stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from kdnas.report.markup import Column, Markup, escape, percent, scaled, table, tag, text, whole
from kdnas.space import Blueprint, Layer

_BOX_WIDTH, _BOX_HEIGHT = 112.0, 56.0


@final
@dataclass(frozen=True)
class _Drawn:
    """A layer with what was measured of it; None where it could not be."""

    position: str
    layer: Layer
    shape: tuple[int, ...] | None
    params: int | None
    macs: int | None


def drawing(blueprint: Blueprint) -> Markup:
    """The network from its first layer to its last.

    The width of a box is the square root of the output's channels, its height the square root of its resolution,
    each relative to the largest map of the network; below it kernel, stride, inner width, output, and the layer's
    share of the multiply-accumulates.
    """
    layers, problem = _measured(blueprint)
    total = sum(one.macs or 0 for one in layers)
    groups = [("Stem", layers[:1])]
    start = 1
    for index, stage in enumerate(blueprint.stages):
        groups.append((f"Stage {index}", layers[start : start + len(stage)]))
        start += len(stage)
    groups.append(("Head", layers[start:]))
    largest = (
        max((one.shape[1] for one in layers if one.shape and len(one.shape) == 4), default=1),
        max((_side(one) for one in layers), default=1),
    )
    drawn = [_group(name, held, place % 8, largest, total) for place, (name, held) in enumerate(groups)]
    size = " × ".join(map(str, blueprint.image))
    legend = "Box width: channels; height: resolution (square roots); /2: stride 2."
    parts = [tag("p", f"Input {size}; {len(layers)} layers. {legend}", class_="soft")]
    if problem:
        parts.append(tag("p", f"Shapes and costs could not be measured: {problem}", class_="missing"))
    rows = [
        (one.position, str(one.layer), _shape(one.shape), one.params, one.macs, one.macs / total if total else None)
        if one.macs is not None
        else (one.position, str(one.layer), None, None, None, None)
        for one in layers
    ]
    columns = [
        Column("Position", text, numeric=False, code=True),
        Column("Layer", text, numeric=False, code=True),
        Column("Output", text),
        Column("Params", whole),
        Column("MACs", whole),
        Column("of all MACs", percent),
    ]
    listed = tag("details", tag("summary", "The layers as a table"), table(columns, rows))
    return tag("div", *parts, tag("div", *drawn, class_="network"), listed)


def _measured(blueprint: Blueprint) -> tuple[list[_Drawn], str | None]:
    named = list(blueprint.named_layers())
    try:
        from kdnas.costs.count import feature_shapes, layer_costs  # torch: only where a network is drawn

        shapes, costs = feature_shapes(blueprint), layer_costs(blueprint)
    except Exception as error:  # a layer is anybody's code, and a drawing without numbers is better than none
        return [_Drawn(position, one, None, None, None) for position, one in named], str(error)
    return [_Drawn(position, one, shapes[position], *costs[position]) for position, one in named], None


def _group(name: str, layers: Sequence[_Drawn], colour: int, largest: tuple[int, int], total: int) -> Markup:
    macs = sum(one.macs or 0 for one in layers)
    share = [tag("span", f"{percent(macs / total)} of MACs")] if total else []
    cells = [_cell(one, colour, largest, total) for one in layers]
    return tag("section", tag("h4", name, *share), tag("ol", *cells), class_=f"stage c{colour}")


def _cell(one: _Drawn, colour: int, largest: tuple[int, int], total: int) -> Markup:
    width, height = _BOX_WIDTH * 0.5, _BOX_HEIGHT * 0.5
    if one.shape:
        width = max(3.0, _BOX_WIDTH * min(1.0, one.shape[1] / largest[0]) ** 0.5)
        height = max(3.0, _BOX_HEIGHT * (_side(one) / largest[1]) ** 0.5)
    box = {"x": (_BOX_WIDTH - width) / 2, "y": _BOX_HEIGHT - height, "width": width, "height": height, "rx": 2}
    said = [one.position, str(one.layer)]
    share = []
    if one.macs is not None:
        said += [f"output {_shape(one.shape)}", f"{whole(one.params)} params", f"{whole(one.macs)} MACs"]
        part = one.macs / total if total else 0.0
        share = [
            tag("div", tag("i", style=f"width:{100 * part:.1f}%"), class_="share"),
            tag("span", f"{scaled(one.macs)} · {percent(part)}", class_="soft"),
        ]
    picture = tag(
        "svg", tag("rect", class_="box", **box), viewBox=f"0 0 {_BOX_WIDTH:.0f} {_BOX_HEIGHT + 1:.0f}", role="img"
    )
    return tag(
        "li",
        picture,
        tag("b", one.layer.make.make.rpartition(":")[2]),
        tag("span", _summary(one.layer)),
        tag("span", _shape(one.shape)),
        *share,
        title=escape("\n".join(said)),
    )


def _summary(one: Layer) -> str:
    """Kernel, stride and inner width where the layer has them."""
    given = dict(one.make.arguments)
    stride = f"/{given['stride']}" if given.get("stride", 1) != 1 else ""
    kernel = f"{given['kernel']}×{given['kernel']}" if "kernel" in given else ""
    parts = [f"{kernel} {stride}".strip()] if kernel or stride else []
    parts += [f"inner {given[name]}" for name in ("expanded", "hidden") if name in given]
    return ", ".join(parts) or "\u00a0"


def _side(one: _Drawn) -> int:
    """Height of the output; 1 for a vector."""
    return one.shape[2] if one.shape and len(one.shape) == 4 else 1


def _shape(shape: tuple[int, ...] | None) -> str:
    """The shape for one image, such as `32 × 16 × 16`."""
    return " × ".join(map(str, shape[1:])) if shape else "–"
