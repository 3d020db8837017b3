"""Does every loss have its known value on this torch build, and what losses are there."""

import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

from kdnas.losses.base import Loss
from kdnas.losses.example import example, fill, gates
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.specs import algorithms, resolve


class Checked(NamedTuple):
    """One line of `kdnas losses --check`; `value` is nan where the loss failed, and `error` says how."""

    name: str
    golden: float
    value: float
    matches: bool
    error: str


class Described(NamedTuple):
    """One line of `kdnas list losses`."""

    name: str
    kind: str
    needs: str
    weight: float
    summary: str
    source: str


def losses() -> dict[str, type[Loss | ScaleFactors]]:
    """Every loss, and the regulariser, by its file's name, sorted by folder and name."""
    found = {}
    for name, path in sorted(algorithms("kdnas.losses").items(), key=lambda item: item[1]):
        made = resolve(path)
        if isinstance(made, type) and issubclass(made, Loss | ScaleFactors):
            found[name] = made
    return found


def value(make: type[Loss | ScaleFactors]) -> float:
    """A loss's value on the example batch, its parts filled from a formula: what `golden` records."""
    if issubclass(make, ScaleFactors):
        return float(make().penalty(gates()))
    student, teacher, labels = example(dense=make.dense)
    loss = make()
    loss.prepare(student, teacher)
    fill(loss.double())
    return float(loss(student, teacher, labels).detach())


def agrees(golden: float, value: float) -> bool:
    """Equal to 9 digits: what float64 sums in another order leave."""
    return math.isclose(golden, value, rel_tol=1e-9, abs_tol=1e-12)


def check() -> list[Checked]:
    """Every loss's golden value, its value on this torch build, and whether they agree."""
    rows = []
    for name, make in losses().items():
        golden = math.nan if make.golden is None else make.golden
        try:
            found, error = value(make), ""
        except Exception as failure:  # whatever this torch build raises is the finding
            found, error = math.nan, f"{type(failure).__name__}: {failure}"
        rows.append(Checked(name, golden, found, agrees(golden, found), error))
    return rows


def describe() -> list[Described]:
    """Name, kind (its folder), what it reads, default weight, first line and reference of every loss."""
    rows = []
    for name, make in losses().items():
        text = inspect.cleandoc(make.__doc__ or "")
        summary = text.splitlines()[0] if text else ""
        kind = make.__module__.split(".")[-2]
        rows.append(Described(name, kind, ", ".join(make.needs), make.weight, summary, _paragraph(text, "Reference:")))
    return rows


def table(rows: Sequence[Checked | Described]) -> str:
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
