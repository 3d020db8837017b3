"""Golden values of all losses on this torch build, and a table that describes the losses."""

import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

from kdnas.losses.base import Loss
from kdnas.losses.example import example, fill, gates
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.specs import algorithms, resolve


class GoldenCheck(NamedTuple):
    """A line of `kdnas losses --check`; where the loss raised, `value` is nan and `error` the exception's text."""

    name: str
    golden: float
    value: float
    matches: bool
    error: str


class Description(NamedTuple):
    """A line of `kdnas list losses`."""

    name: str
    kind: str
    needs: str
    weight: float
    summary: str
    source: str


def losses() -> dict[str, type[Loss | ScaleFactors]]:
    """All losses and the regulariser by file name, sorted by folder and name."""
    classes = {}
    for name, path in sorted(algorithms("kdnas.losses").items(), key=lambda item: item[1]):
        target = resolve(path)
        if isinstance(target, type) and issubclass(target, Loss | ScaleFactors):
            classes[name] = target
    return classes


def value(make: type[Loss | ScaleFactors]) -> float:
    """A loss's value on the example batch, with learnable parts filled from a formula; `golden` is this value."""
    if issubclass(make, ScaleFactors):
        return float(make().penalty(gates()))
    student, teacher, labels = example(dense=make.dense)
    loss = make()
    loss.prepare(student, teacher)
    fill(loss.double())
    return float(loss(student, teacher, labels).detach())


def agrees(golden: float, value: float) -> bool:
    """Whether the values are equal to 9 digits, the accuracy of float64 sums in another order."""
    return math.isclose(golden, value, rel_tol=1e-9, abs_tol=1e-12)


def check() -> list[GoldenCheck]:
    """Compare every loss's golden value with its value on this torch build."""
    rows = []
    for name, make in losses().items():
        golden = math.nan if make.golden is None else make.golden
        try:
            current, error = value(make), ""
        except Exception as failure:  # whatever this torch build raises is the result
            current, error = math.nan, f"{type(failure).__name__}: {failure}"
        rows.append(GoldenCheck(name, golden, current, agrees(golden, current), error))
    return rows


def describe() -> list[Description]:
    """Name, kind (its folder), inputs, default weight, summary and reference of every loss."""
    rows = []
    for name, make in losses().items():
        text = inspect.cleandoc(make.__doc__ or "")
        summary = text.splitlines()[0] if text else ""
        kind = make.__module__.split(".")[-2]
        rows.append(
            Description(name, kind, ", ".join(make.needs), make.weight, summary, _paragraph(text, "Reference:"))
        )
    return rows


def table(rows: Sequence[GoldenCheck | Description]) -> str:
    """Rows as plain text in columns."""
    if not rows:
        return "no losses found"
    cells = [rows[0]._fields, *([_cell(field) for field in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(field: object) -> str:
    if isinstance(field, bool):
        return "yes" if field else "NO"
    return f"{field:.12g}" if isinstance(field, float) else str(field)


def _paragraph(text: str, opening: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(opening):
            lines.append(line.removeprefix(opening))
        elif lines and (not line.strip() or line.startswith("Differs:")):
            break
        elif lines:
            lines.append(line)
    return " ".join(" ".join(lines).split())
