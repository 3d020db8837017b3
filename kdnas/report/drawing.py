"""A network as boxes, one per layer, grouped by stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from markupsafe import Markup

from kdnas.report.markup import Column, percent, scaled, table, tag, text, whole
from kdnas.space import Blueprint, Layer

_BOX_WIDTH, _BOX_HEIGHT = 112.0, 56.0


@final
@dataclass(frozen=True)
class _Box:
    """A layer with its output shape and cost; None where they could not be measured."""

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
    total = sum(box.macs or 0 for box in layers)
    groups = [("Stem", layers[:1])]
    start = 1
    for index, stage in enumerate(blueprint.stages):
        groups.append((f"Stage {index}", layers[start : start + len(stage)]))
        start += len(stage)
    groups.append(("Head", layers[start:]))
    largest = (
        max((box.shape[1] for box in layers if box.shape and len(box.shape) == 4), default=1),
        max((_side(box) for box in layers), default=1),
    )
    stages = [_group(name, boxes, place % 8, largest, total) for place, (name, boxes) in enumerate(groups)]
    size = " × ".join(map(str, blueprint.image))
    legend = "Box width: channels; height: resolution (square roots); /2: stride 2."
    parts = [tag("p", f"Input {size}; {len(layers)} layers. {legend}", class_="soft")]
    if problem:
        parts.append(tag("p", f"Shapes and costs could not be measured: {problem}", class_="missing"))
    rows = [
        (box.position, str(box.layer), _shape(box.shape), box.params, box.macs, box.macs / total if total else None)
        if box.macs is not None
        else (box.position, str(box.layer), None, None, None, None)
        for box in layers
    ]
    columns = [
        Column("Position", text, numeric=False, code=True),
        Column("Layer", text, numeric=False, code=True),
        Column("Output", text),
        Column("Params", whole),
        Column("MACs", whole),
        Column("of all MACs", percent),
    ]
    layer_table = tag("details", tag("summary", "The layers as a table"), table(columns, rows))
    return tag("div", *parts, tag("div", *stages, class_="network"), layer_table)


def _measured(blueprint: Blueprint) -> tuple[list[_Box], str | None]:
    layers = list(blueprint.named_layers())
    try:
        from kdnas.costs.count import feature_shapes, layer_costs  # torch: only where a network is drawn

        shapes, costs = feature_shapes(blueprint), layer_costs(blueprint)
    except Exception as error:  # a layer is any code, and a drawing without numbers is better than none
        return [_Box(position, layer, None, None, None) for position, layer in layers], str(error)
    return [_Box(position, layer, shapes[position], *costs[position]) for position, layer in layers], None


def _group(name: str, layers: Sequence[_Box], colour: int, largest: tuple[int, int], total: int) -> Markup:
    macs = sum(box.macs or 0 for box in layers)
    share = [tag("span", f"{percent(macs / total)} of MACs")] if total else []
    cells = [_cell(box, colour, largest, total) for box in layers]
    return tag("section", tag("h4", name, *share), tag("ol", *cells), class_=f"stage c{colour}")


def _cell(box: _Box, colour: int, largest: tuple[int, int], total: int) -> Markup:
    width, height = _BOX_WIDTH * 0.5, _BOX_HEIGHT * 0.5
    if box.shape:
        width = max(3.0, _BOX_WIDTH * min(1.0, box.shape[1] / largest[0]) ** 0.5)
        height = max(3.0, _BOX_HEIGHT * (_side(box) / largest[1]) ** 0.5)
    rectangle = {"x": (_BOX_WIDTH - width) / 2, "y": _BOX_HEIGHT - height, "width": width, "height": height, "rx": 2}
    tooltip = [box.position, str(box.layer)]
    share = []
    if box.macs is not None:
        tooltip += [f"output {_shape(box.shape)}", f"{whole(box.params)} params", f"{whole(box.macs)} MACs"]
        part = box.macs / total if total else 0.0
        share = [
            tag("div", tag("i", style=f"width:{100 * part:.1f}%"), class_="share"),
            tag("span", f"{scaled(box.macs)} · {percent(part)}", class_="soft"),
        ]
    picture = tag(
        "svg", tag("rect", class_="box", **rectangle), viewBox=f"0 0 {_BOX_WIDTH:.0f} {_BOX_HEIGHT + 1:.0f}", role="img"
    )
    return tag(
        "li",
        picture,
        tag("b", box.layer.make.make.rpartition(":")[2]),
        tag("span", _summary(box.layer)),
        tag("span", _shape(box.shape)),
        *share,
        title="\n".join(tooltip),
    )


def _summary(layer: Layer) -> str:
    """Kernel, stride and inner width where the layer has them."""
    arguments = dict(layer.make.arguments)
    stride = f"/{arguments['stride']}" if arguments.get("stride", 1) != 1 else ""
    kernel = f"{arguments['kernel']}×{arguments['kernel']}" if "kernel" in arguments else ""
    parts = [f"{kernel} {stride}".strip()] if kernel or stride else []
    parts += [f"inner {arguments[name]}" for name in ("expanded", "hidden") if name in arguments]
    return ", ".join(parts) or "\u00a0"


def _side(box: _Box) -> int:
    """Height of the output; 1 for a vector."""
    return box.shape[2] if box.shape and len(box.shape) == 4 else 1


def _shape(shape: tuple[int, ...] | None) -> str:
    """The shape for one image, such as `32 × 16 × 16`."""
    return " × ".join(map(str, shape[1:])) if shape else "–"
