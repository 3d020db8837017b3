"""HTML elements, numbers as people read them, tables, the whole page."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from markupsafe import Markup, escape

from kdnas.report.style import STYLE
from kdnas.runs.files import write_atomically
from kdnas.runs.folder import REPORT

_NOTHING = "–"


def join(parts: Iterable[Any]) -> Markup:
    """The parts one after another, each escaped unless it is markup."""
    return Markup().join(parts)


def tag(name: str, *content: Any, **attributes: Any) -> Markup:
    """One element with both its tags, its content and attributes escaped unless they are markup.

    In attribute names `_` stands for `-`, and a final `_` is dropped. An attribute that is None is left out.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{pairs}>{join(content)}</{name}>")


def _short(value: Any) -> Any:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def write_page(folder: Path, page: str) -> Path:
    """Write a folder's `report.html`, unless it is there already, and return its path."""
    path = folder / REPORT
    content = page.encode("utf-8", "replace")  # a lone surrogate, which JSON can spell, has no UTF-8 form
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, lambda draft: draft.write_bytes(content))
    return path


def finite(value: Any) -> float | int | None:
    """The number, or None where there is none that can be drawn: missing, text, not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return value


def text(value: Any) -> str:
    """A value as it is, markup too; a dash for None."""
    return _NOTHING if value is None else value if isinstance(value, str) else str(value)


def title(words: str) -> str:
    """The words with a capital first letter, unless their first word has capitals of its own, as mIoU and k-NN."""
    return words[:1].upper() + words[1:] if words.partition(" ")[0].islower() else words


def whole(value: Any) -> str:
    """`1,234,567`."""
    number = finite(value)
    return _NOTHING if number is None else f"{number:,.0f}"


def decimal(value: Any) -> str:
    """Four decimals between 0.001 and 10,000, else whole or with four significant digits."""
    number = finite(value)
    if number is None:
        return _NOTHING
    if number == 0 or 1e-3 <= abs(number) < 1e4:
        return f"{number:,.4f}"
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.3e}"


def percent(value: Any) -> str:
    """`97.3 %` of 0.973."""
    number = finite(value)
    return _NOTHING if number is None else f"{100 * number:.1f} %"


def accuracy(value: Any) -> str:
    """`97.31 %` of 0.9731."""
    number = finite(value)
    return _NOTHING if number is None else f"{100 * number:.2f} %"


def scaled(value: Any) -> str:
    """Three digits and a prefix: `1.23 M`."""
    number = finite(value)
    if number is None:
        return _NOTHING
    size, prefix = prefix_of(abs(number) * 1.0005)  # 999.95 k is 1.00 M
    quotient = number / size
    digits = 0 if number == int(number) and size == 1 else max(0, 2 - int(math.log10(max(abs(quotient), 1))))
    return f"{quotient:.{digits}f}{prefix}"


def prefix_of(magnitude: float) -> tuple[float, str]:
    """The factor and the prefix, with its space, for numbers of this magnitude."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if magnitude >= size:
            return size, prefix
    return 1.0, ""


def duration(value: Any) -> str:
    """Seconds as `4.2 s`, `3 min 05 s` or `2 h 07 min`."""
    seconds = finite(value)
    if seconds is None:
        return _NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@final
@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        write: a value to text, or to Markup where a cell holds more than text.
        numeric: aligned to the right with digits of equal width.
        code: set in a fixed-width face.
    """

    name: str
    write: Callable[[Any], str] = text
    numeric: bool = True
    code: bool = False


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    *,
    visible: int | None = None,
    marked: Collection[int] = (),
    what: str = "rows",
) -> Markup:
    """A table; on narrow screens every row is a list of headings and values.

    Args:
        columns: headings and formats.
        rows: one value per column.
        visible: number of rows that are visible at once; the others unfold. All, if None.
        marked: indices of highlighted rows.
        what: plural noun for the rows, in the line that unfolds the others.
    """
    kinds = [" ".join(k for k, on in (("number", c.numeric), ("code", c.code)) if on) or None for c in columns]
    head = tag("tr", *(tag("th", c.name, class_=k, scope="col") for c, k in zip(columns, kinds, strict=True)))
    body = [
        tag(
            "tr",
            *(tag("td", c.write(v), class_=k, data_name=c.name) for c, k, v in zip(columns, kinds, row, strict=True)),
            class_="marked" if place in marked else None,
        )
        for place, row in enumerate(rows)
    ]
    cut = len(body) if visible is None or len(body) <= visible + 2 else visible
    parts = [tag("thead", head), tag("tbody", *body[:cut])]
    more = Markup("")
    if body[cut:]:
        parts.append(tag("tbody", *body[cut:], class_="more"))
        more = tag("details", tag("summary", f"{len(body) - cut} more {what}"))
    return tag("div", tag("div", tag("table", *parts), class_="wide"), more, class_="rows")


def document(
    title: str,
    heading: str,
    intro: Sequence[Markup],
    sections: Sequence[tuple[str, str, Iterable[Markup]]],
    notes: Sequence[Markup] = (),
) -> str:
    """A whole page: heading, intro, links to the sections, notes, and the sections as (key, title, content)."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    nav = tag("nav", *(tag("a", name, href=f"#{key}") for key, name, _ in sections))
    body = [tag("section", tag("h2", name), *content, id=key) for key, name, content in sections]
    main = tag("main", tag("h1", heading), *intro, nav, *notes, *body)
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n"
