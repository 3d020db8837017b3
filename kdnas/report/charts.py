"""Charts as inline SVG without scripts; a mark's tooltip has its numbers."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from kdnas.report.axis import Axis
from kdnas.report.markup import decimal, finite, join, tag
from kdnas.statistics import pareto_front

_WIDTH, _HEIGHT = 540, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 46
_NUM_COLOURS = 8
_MOST_POINTS = 2000
_MOST_STEPS = 200


class Point(NamedTuple):
    """A mark of a scatter with its tooltip."""

    x: float
    y: float
    title: str


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    y_unit: str = "",
    bounds: Mapping[str, float] | None = None,
    stars: Mapping[str, int] | None = None,
) -> Markup:
    """Points, higher is better and further left is cheaper, with their Pareto front.

    Args:
        points: finite; at most 2,000 of them are drawn, and the front and the stars always.
        x_label: the cost and its unit.
        y_label: the score.
        y_unit: `%` for a fraction that is written as a percentage.
        bounds: upper bounds on the cost, by name; points beyond the tightest are drawn pale.
        stars: indices of highlighted points, by name.
    """
    bounds, stars = bounds or {}, stars or {}
    limit = min(bounds.values(), default=math.inf)
    x = Axis.around([p.x for p in points] + list(bounds.values()), _LEFT, _WIDTH - _RIGHT)
    y = Axis.around([p.y for p in points], _HEIGHT - _BOTTOM, _TOP, unit=y_unit, may_be_log=False)
    front = sorted(pareto_front([(p.x, -p.y) for p in points]).tolist(), key=lambda i: points[i].x)
    every = (
        (i * len(points) // _MOST_POINTS for i in range(_MOST_POINTS))
        if len(points) > _MOST_POINTS
        else range(len(points))
    )
    indices = sorted({*every, *front, *stars.values()})
    marks = [mark for name, bound in bounds.items() for mark in _bound(name, x.place(bound))]
    on_front = set(front)
    plain = [i for i in indices if i not in on_front]
    marks += [_circle(points[i], x, y, "point" if points[i].x <= limit else "point over", 3.2) for i in plain]
    marks.append(_staircase([points[i] for i in front], x, y))
    marks += [_circle(points[i], x, y, "front", 4.0) for i in front]
    marks += [mark for name, i in stars.items() for mark in _star(name, points[i], x, y)]
    legend = [("point", "scored architecture", ""), ("front", "Pareto front", "")]
    legend += [("point over", "over the budget", "")] if any(p.x > limit for p in points) else []
    legend += [("star", "chosen student", "")] if stars else []
    note = f"{len(indices):,} of {len(points):,} points drawn" if len(indices) < len(points) else None
    return _figure(legend, _framed(x, y, x_label, y_label, marks), f"{y_label} against {x_label}", note)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    y_unit: str = "",
    x_end: float = 0,
) -> Markup:
    """Lines over a common x, with their last values in the legend; long ones are averaged down to 200 steps.

    Args:
        series: name to pairs of x and y, ascending in x; values that are not finite are left out.
        x_label: name of x.
        y_label: name of y, with its unit.
        y_unit: `%` for a fraction that is written as a percentage.
        x_end: the x axis reaches at least from 0 to here.
    """
    clean = {n: [(a, b) for a, b in pairs if finite(b) is not None] for n, pairs in series.items()}
    places = sorted({a for pairs in clean.values() for a, _ in pairs})
    size = max(1, math.ceil(len(places) / _MOST_STEPS))
    groups = [places[i : i + size] for i in range(0, len(places), size)]
    lines = {name: _averaged(pairs, groups) for name, pairs in clean.items() if pairs}
    x = Axis.around([0, x_end, *places], _LEFT, _WIDTH - _RIGHT, may_be_log=False)
    averages = [v for line in lines.values() for v in line.values()]
    y = Axis.around(averages, _HEIGHT - _BOTTOM, _TOP, unit=y_unit, may_be_log=not y_unit)
    marks: list[Markup] = []
    for place, line in enumerate(lines.values()):
        where = [(x.place(groups[g][-1]), y.place(v)) for g, v in line.items()]
        look = f"line {_colour(place)}"
        marks.append(tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in where), class_=look))
        if len(where) <= 30:
            marks += [tag("circle", cx=a, cy=b, r=2.4, class_=f"dot {_colour(place)}") for a, b in where]
    edges = [x.place(g[-1]) for g in groups]
    for g, group in enumerate(groups):
        left = (edges[g - 1] + edges[g]) / 2 if g else x.start
        right = (edges[g + 1] + edges[g]) / 2 if g + 1 < len(edges) else x.end
        tooltip = [f"{x_label} {group[-1]:,.0f}"]
        tooltip += [f"{name}: {_number(line[g], y_unit)}" for name, line in lines.items() if g in line]
        band = {"x": left, "y": _TOP, "width": right - left, "height": _HEIGHT - _BOTTOM - _TOP}
        marks.append(tag("rect", tag("title", "\n".join(tooltip)), class_="hit", **band))
    legend = [(f"key {_colour(i)}", n, _number(clean[n][-1][1], y_unit)) for i, n in enumerate(lines)]
    return _figure(legend, _framed(x, y, x_label, y_label, marks), f"{y_label} over {x_label}")


def bars(values: Mapping[str, float], *, write: Callable[[float], str] = decimal) -> Markup:
    """One horizontal bar per name, as long as its value, which is not negative.

    Args:
        values: name to value.
        write: the value as text beside the bar.
    """
    most = max(values.values(), default=0) or 1
    rows = [
        tag(
            "div",
            tag("span", name),
            tag("div", tag("i", class_=_colour(place), style=f"width:{100 * value / most:.1f}%")),
            tag("b", write(value)),
        )
        for place, (name, value) in enumerate(values.items())
    ]
    return tag("figure", *rows, class_="bars")


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    write: Callable[[float], str] = lambda value: f"{value:.2f}",
    row_label: str = "",
    column_label: str = "",
) -> Markup:
    """A matrix as coloured cells; negative values in the second colour. The largest value of each row is framed.

    Args:
        rows: a name per row.
        columns: a name per column.
        values: `values[row][column]`; cells of values that are not finite are empty.
        write: a value as text.
        row_label: noun for the rows.
        column_label: noun for the columns.

    Raises:
        ValueError: the values have another shape than the names.
    """
    if len(values) != len(rows) or any(len(line) != len(columns) for line in values):
        raise ValueError(
            f"`values` must have {len(rows)} rows of {len(columns)} numbers, got rows of {[len(v) for v in values]}."
        )
    size = [[finite(v) for v in line] for line in values]
    most = max((abs(v) for line in size for v in line if v is not None), default=0) or 1
    label = 16 + 7 * max(map(len, rows), default=0)
    top = 40 + 6 * max(map(len, columns), default=0)
    wide = max(14.0, min(56.0, 760 / max(len(columns), 1)))
    high = min(wide, 30.0)
    cells: list[Markup] = [
        tag("text", f"{row_label or 'rows'} (down), {column_label or 'columns'} (across)", x=0, y=14, class_="axis")
    ]
    for j, name in enumerate(columns):
        x = label + (j + 0.5) * wide
        turn = f"translate({x:.1f} {top - 6}) rotate(-60)"
        cells.append(tag("text", name, transform=turn, class_="name"))
    for i, name in enumerate(rows):
        y = top + i * high
        cells.append(tag("text", name, x=label - 8, y=y + high / 2 + 4, text_anchor="end", class_="name"))
        best = max((v for v in size[i] if v is not None), default=None)
        for j, value in enumerate(size[i]):
            at = {"x": label + j * wide, "y": y, "width": wide - 1.5, "height": high - 1.5}
            if value is None:
                cells.append(tag("rect", tag("title", f"{name}, {columns[j]}: no value"), class_="empty", **at))
                continue
            look = f"cell {_colour(0 if value >= 0 else 1)}{' best' if value == best else ''}"
            depth = f"{0.04 + 0.6 * abs(value) / most:.2f}"
            tooltip = tag("title", f"{name}, {columns[j]}: {write(value)}")
            cells.append(tag("rect", tooltip, class_=look, fill_opacity=depth, **at))
            if wide >= 36:
                where = {"x": at["x"] + wide / 2 - 0.8, "y": y + high / 2 + 3.5}
                cells.append(tag("text", write(value), text_anchor="middle", class_="in", **where))
    width, height = label + wide * len(columns) + 60, top + high * len(rows) + 6
    picture = _drawing(cells, width, height, natural=True)
    return _figure([], picture, f"{row_label or 'rows'} by {column_label or 'columns'}")


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.2f} %" if unit else decimal(value)


def _colour(place: int) -> str:
    """One of eight colours; further series repeat them with a dashed line."""
    return f"c{place % _NUM_COLOURS}" + (" again" if place >= _NUM_COLOURS else "")


def _circle(point: Point, x: Axis, y: Axis, look: str, radius: float) -> Markup:
    return tag("circle", tag("title", point.title), cx=x.place(point.x), cy=y.place(point.y), r=radius, class_=look)


def _bound(name: str, at: float) -> list[Markup]:
    """A vertical line with its name on the side that has more room."""
    side, offset = ("end", -6) if at > _WIDTH / 2 else ("start", 6)
    bottom = _HEIGHT - _BOTTOM
    return [
        tag("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="bound"),
        tag("text", name, x=at + offset, y=bottom - 8, text_anchor=side, class_="bound"),
    ]


def _star(name: str, point: Point, x: Axis, y: Axis) -> list[Markup]:
    """A diamond with its name on the side that has more room."""
    left, top = x.place(point.x), y.place(point.y)
    side, offset = ("start", 12) if left < _WIDTH * 0.7 else ("end", -12)
    diamond = f"M{left:.1f} {top - 8:.1f}l8 8l-8 8l-8 -8z"
    return [
        tag("path", tag("title", f"{name}\n{point.title}"), d=diamond, class_="star"),
        tag("text", name, x=left + offset, y=top + 18, text_anchor=side, class_="star"),
    ]


def _staircase(front: Sequence[Point], x: Axis, y: Axis) -> Markup:
    """The best score within each cost: a line that rises at the points of the front."""
    places = [(x.place(p.x), y.place(p.y)) for p in front]
    corners = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"] if places else []
    corners += [f"H{a:.1f}V{b:.1f}" for a, b in places[1:]] + ([f"H{x.end:.1f}"] if places else [])
    return tag("path", d="".join(corners), class_="stairs")


def _averaged(pairs: Sequence[tuple[float, float]], groups: Sequence[Sequence[float]]) -> dict[int, float]:
    """The mean of the values in each group of steps that has any."""
    ends = [group[-1] for group in groups]
    members: dict[int, list[float]] = {}
    for a, b in pairs:
        members.setdefault(bisect.bisect_left(ends, a), []).append(b)
    return {group: sum(values) / len(values) for group, values in sorted(members.items())}


def _framed(x: Axis, y: Axis, x_label: str, y_label: str, marks: Sequence[Markup]) -> Markup:
    bottom, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
    lines: list[Markup] = []
    for value, name in x.ticks():
        at = x.place(value)
        lines += [
            tag("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="grid"),
            tag("text", name, x=at, y=bottom + 17, text_anchor="middle", class_="tick"),
        ]
    for value, name in y.ticks():
        at = y.place(value)
        lines += [
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"),
            tag("text", name, x=_LEFT - 8, y=at + 4, text_anchor="end", class_="tick"),
        ]
    frame = {"x": _LEFT, "y": _TOP, "width": _WIDTH - _LEFT - _RIGHT, "height": bottom - _TOP}
    across = x_label + (", logarithmic" if x.log else "")
    upward = y_label + (", logarithmic" if y.log else "")
    lines += [
        tag("rect", class_="frame", **frame),
        tag("text", across, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8, text_anchor="middle", class_="axis"),
        tag("text", upward, transform=f"translate(13 {middle:.1f}) rotate(-90)", text_anchor="middle", class_="axis"),
    ]
    return _drawing([*lines, *marks], _WIDTH, _HEIGHT)


def _drawing(marks: Sequence[Markup], width: float, height: float, *, natural: bool = False) -> Markup:
    fixed = {"width": round(width), "height": round(height)} if natural else {}
    return tag("svg", join(marks), viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", **fixed)


def _figure(
    legend: Sequence[tuple[str, str, str]], picture: Markup, description: str, note: str | None = None
) -> Markup:
    """A picture with its legend of (look, name, value) above and a note below."""
    keys = [
        tag("span", tag("i", class_=look), name, tag("b", value) if value else "", class_="entry")
        for look, name, value in legend
    ]
    above = [tag("div", *keys, class_="legend")] if keys else []
    below = [tag("figcaption", note)] if note else []
    return tag("figure", *above, picture, *below, aria_label=description)
