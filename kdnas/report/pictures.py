"""Test images with what teacher and student answer, side by side."""

import re
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from kdnas.report.content import RunContent, listed, mapping
from kdnas.report.markup import accuracy, tag, whole

_SIDES = ("image", "truth", "teacher", "student")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_COLOUR = re.compile(r"#[0-9a-f]{6}")


def pictures(run: RunContent) -> Iterator[Markup]:
    """A row of pictures per image, and which colour is which class."""
    rows = [mapping(each) for each in listed(run.pictures.get("images"))]
    rows = [row for row in rows if all(_is_picture(row.get(side)) for side in _SIDES)]
    yield tag(
        "p",
        f"Test images, evenly spread from the best to the worst by the student's {run.measure} of each. Grey has no "
        "label.",
        class_="soft",
    )
    heads = [tag("b", "Image"), tag("b", "Labels"), tag("b", "Teacher"), tag("b", "Student")]
    cells = [
        tag(
            "figure",
            tag(
                "img", src=f"data:image/png;base64,{row[side]}", alt=f"{side} of test image {whole(row.get('number'))}"
            ),
            *[tag("figcaption", f"{accuracy(row.get('quality'))} {run.measure}")] * (side == "student"),
        )
        for row in rows
        for side in _SIDES
    ]
    yield tag("div", *heads, *cells, class_="gallery")
    pairs = [pair for pair in listed(run.pictures.get("classes")) if isinstance(pair, list) and len(pair) == 2]
    yield tag(
        "p",
        *(
            tag("span", tag("i", style=f"background:{colour}"), str(name), class_="entry")
            for name, colour in pairs
            if isinstance(colour, str) and _COLOUR.fullmatch(colour)
        ),
        class_="legend",
    )


def _is_picture(value: Any) -> bool:
    return isinstance(value, str) and _BASE64.fullmatch(value) is not None
