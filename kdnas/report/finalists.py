"""The finalists of a run: how far each was trained, what it reached, and their curves; the student first."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from kdnas.report.charts import curves
from kdnas.report.content import RunContent, mapping
from kdnas.report.markup import Column, accuracy, decimal, duration, finite, table, tag, text, title, whole
from kdnas.report.names import phase_name


def finalists(run: RunContent) -> Iterator[Markup]:
    """A table with a row per finalist, and the accuracy of each over its training."""
    record = run.phase("finals")
    listed = record.get("rows")
    rows = [mapping(row) for row in listed] if isinstance(listed, list) else []
    winner = record.get("winner")

    def order(row: dict[str, Any]) -> tuple[bool, float, float]:
        return row.get("name") != winner, -(finite(row.get("step")) or 0), -(finite(row.get("accuracy")) or 0)

    rows.sort(key=order)
    yield tag(
        "p",
        "The best of the ranking that differ from all better ones in enough of their choices, and of three or more, as "
        "the last one, the largest within the budget. Each was measured on the search part; the pruner stopped some, "
        "and the best of those that were trained whole is the student. No test image had a part in that.",
        class_="soft",
    )
    columns = [
        Column("Finalist", text, numeric=False),
        Column("Place in the ranking", whole),
        Column("Code", text, numeric=False, code=True),
        Column("Score", decimal),
        Column("Steps", whole),
        Column("of", whole),
        Column(f"{title(run.measure)} on the search part", accuracy),
        Column("Time", duration),
    ]
    keys = ("place", "code", "score", "step", "steps", "accuracy", "seconds")
    lines = [(phase_name(str(row.get("name"))), *(row.get(key) for key in keys)) for row in rows]
    yield table(columns, lines, marked=[i for i, row in enumerate(rows) if row.get("name") == winner])
    for row in rows:
        if row.get("problem"):
            yield tag("p", f"{phase_name(str(row.get('name')))} ended early: {row['problem']}", class_="missing")
    names = [str(row.get("name")) for row in rows]
    series = {phase_name(name): run.accuracies(name) for name in names}
    series = {name: pairs for name, pairs in series.items() if pairs}
    ends = [end for row in rows if (end := finite(row.get("steps"))) is not None]
    if series and ends:
        yield curves(series, x_label="step", y_label=f"{run.measure} on the search part", y_unit="%", x_end=max(ends))
