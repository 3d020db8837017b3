"""What `kdnas why` run of one architecture."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from kdnas.report.charts import heat_map
from kdnas.report.content import RunContent, listed, mapping
from kdnas.report.markup import Column, decimal, finite, percent, table, tag, text, whole


def explanation(run: RunContent) -> Iterator[Markup]:
    """Similarity of every student stage to every teacher stage, cost per stage, and the effect of each choice."""
    why = run.why
    scorer = f", {text(why.get('scorer'))} {decimal(why.get('score'))}."
    yield tag("p", "Architecture ", tag("code", text(why.get("code"))), scorer)
    similarity = mapping(why.get("similarity"))
    rows, columns = ([str(name) for name in listed(similarity.get(side))] for side in ("student", "teacher"))
    values = [[finite(v) for v in listed(line)] for line in listed(similarity.get("values"))]
    if rows and len(values) == len(rows) and all(len(line) == len(columns) for line in values):
        numbers = [[float("nan") if v is None else v for v in line] for line in values]
        yield heat_map(rows, columns, numbers, row_label="student", column_label="teacher")
        yield tag(
            "p", "Correlation of the dissimilarities of the same images: 1 for the teacher itself.", class_="soft"
        )
    stages = [mapping(s) for s in listed(why.get("stages"))]
    if stages:
        headings = [
            Column("Stage", text, numeric=False),
            Column("Layers", whole),
            Column("Params", whole),
            Column("of the whole", percent),
            Column("MACs", whole),
            Column("of the whole", percent),
        ]
        keys = ("stage", "layers", "params", "share of params", "macs", "share of macs")
        yield table(headings, [tuple(s.get(key) for key in keys) for s in stages])
    choices = [mapping(c) for c in listed(why.get("choices"))]
    if choices:
        yield tag("p", "The effect of changing one choice, best first:", class_="soft")
        headings = [
            Column("Choice", text, numeric=False, code=True),
            Column("From", text),
            Column("To", text),
            Column("Score", _signed),
            Column("Params", _signed),
            Column("MACs", _signed),
            Column("Code", text, numeric=False, code=True),
        ]
        keys = ("choice", "from", "to", "score difference", "params difference", "macs difference", "code")
        yield table(headings, [tuple(c.get(key) for key in keys) for c in choices], visible=12, what="choices")


def _signed(value: Any) -> str:
    number = finite(value)
    digits = whole(value) if isinstance(value, int) else decimal(value)
    return f"+{digits}" if number is not None and number > 0 else digits
