"""The closing table, in words and numbers, and the controls."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from kdnas.report.content import RunContent, mapping
from kdnas.report.markup import (
    Column,
    accuracy,
    decimal,
    duration,
    finite,
    percent,
    scaled,
    table,
    tag,
    text,
    whole,
)
from kdnas.report.names import network_name
from kdnas.report.todo import commands, missing
from kdnas.runs.folder import JsonObject


def result(run: RunContent) -> Iterator[Markup]:
    """The closing table, its main numbers and a sentence."""
    rows = dict(run.closing)
    if not rows and run.phase("teacher"):
        rows = {"teacher": run.phase("teacher")}
    if not run.closing and not {"grow", "prune"} & set(run.job()):
        yield missing("The closing table needs a retrained student.", commands(run)["retrain"][1])
    sentence = _sentence(rows)
    if sentence:
        yield tag("p", sentence, class_="lead")
    for words in (_removal(run.phase("removal")), _members(run.phase("grow"))):
        if words:
            yield tag("p", words)
    tiles = list(_tiles(rows, sum(seconds for seconds, _ in run.seconds().values())))
    if tiles:
        yield tag(
            "div",
            *(tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in tiles),
            class_="tiles",
        )
    if rows:
        most = finite(mapping(rows.get("teacher")).get("macs"))
        columns = [
            Column("Network", text, numeric=False),
            Column("Test accuracy", accuracy),
            Column("Params", whole),
            Column("MACs", whole),
            Column("MACs of the teacher's", percent),
            Column("Time", duration),
        ]
        lines = []
        for name, row in rows.items():
            macs = finite(row.get("macs"))
            share = macs / most if macs is not None and most else None
            lines.append((network_name(name), row.get("accuracy"), row.get("params"), macs, share, row.get("seconds")))
        marked = [i for i, name in enumerate(rows) if name == "student"]
        yield table(columns, lines, marked=marked)


def _removal(removal: JsonObject) -> str:
    """A pruning's removal, in words."""
    before, after = mapping(removal.get("whole")), mapping(removal.get("left"))
    if not (before and after):
        return ""
    how = (
        f"{whole(removal.get('zeros'))} of {whole(removal.get('factors'))} scale factors became exactly 0. "
        if "zeros" in removal
        else f"{whole(removal.get('candidates'))} removals were scored under the network itself. "
    )
    return (
        f"{how}It shrinks from {whole(before.get('params'))} params and {whole(before.get('macs'))} MACs to "
        f"{whole(after.get('params'))} params and {whole(after.get('macs'))} MACs, and reaches "
        f"{accuracy(removal.get('accuracy'))} of the search part before it is retrained."
    )


def _members(growth: JsonObject) -> str:
    """An ensemble's members and their weights, in words."""
    codes, weights = growth.get("members"), growth.get("weights")
    if not (isinstance(codes, list) and isinstance(weights, list) and len(codes) == len(weights)):
        return ""
    members = ", ".join(f"{code} ({decimal(weight)})" for code, weight in zip(codes, weights, strict=True))
    return f"The ensemble's members, with their weights: {members}."


def _accuracies(rows: Mapping[str, JsonObject]) -> list[float | None]:
    return [finite(mapping(rows.get(name)).get("accuracy")) for name in ("teacher", "student", "control")]


def _sentence(rows: Mapping[str, JsonObject]) -> str:
    """The result in words, from the closing table."""
    teacher, student, control = _accuracies(rows)
    if student is None:
        return ""
    parts = [f"The distilled student reaches {accuracy(student)} test accuracy"]
    if teacher is not None:
        parts.append(f", {_points(student - teacher)} {'above' if student > teacher else 'below'} its teacher")
    if control is not None and student > control:
        parts.append(f"; the same student without a teacher reaches {accuracy(control)}")
    elif control is not None:
        parts.append(f"; without a teacher it reaches {accuracy(control)}, so distillation did not help here")
    return "".join(parts) + "."


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.2f} points"


def _tiles(rows: Mapping[str, JsonObject], seconds: float) -> Iterator[tuple[str, str]]:
    teacher, student, control = _accuracies(rows)
    large, small = (finite(mapping(rows.get(name)).get("macs")) for name in ("teacher", "student"))
    if student is not None:
        yield (
            accuracy(student),
            "student's test accuracy" + (f"; teacher {accuracy(teacher)}" if teacher is not None else ""),
        )
    if large and small:
        yield f"1/{large / small:.1f}", f"of the teacher's MACs: {scaled(small)} against {scaled(large)}"
    if student is not None and control is not None:
        sign = "+" if student >= control else "−"
        yield f"{sign}{_points(student - control)}", f"from distillation; control {accuracy(control)}"
    if seconds:
        yield duration(seconds), "in all phases"


def controls(run: RunContent) -> Iterator[Markup]:
    """The controls of `results.json`: size alone, random search, training without a teacher."""
    if not run.controls:
        yield missing(
            "The controls (rank correlation with size alone, random search at equal cost, the student without a "
            "teacher) are measured with the closing table.",
            commands(run)["retrain"][1],
        )
        return
    sentences = [str(c["sentence"]) for c in run.controls.values() if c.get("sentence")]
    yield tag("div", *(tag("p", sentence) for sentence in sentences), class_="honest")
    columns = [
        Column("Control", text, numeric=False),
        Column("Value", _three_digits),
        Column("95 % interval", _interval),
    ]
    yield table(columns, [(name, c.get("value"), c.get("interval")) for name, c in run.controls.items()])


def _three_digits(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:,.3f}".replace("-", "−")


def _interval(value: Any) -> str:
    ends = [finite(v) for v in value] if isinstance(value, list) else []
    return f"{_three_digits(ends[0])} to {_three_digits(ends[1])}" if len(ends) == 2 and None not in ends else "–"
