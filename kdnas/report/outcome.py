"""The closing table, in words and numbers, and the controls."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from markupsafe import Markup

from kdnas.report.charts import curves
from kdnas.report.content import RunContent, listed, mapping
from kdnas.report.markup import (
    Column,
    accuracy,
    decimal,
    duration,
    finite,
    join,
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

_SEED = (
    "One run with one seed: another seed, number of threads or device can choose another network of about the same "
    "{measure}. Intervals are over test images."
)
_SEEDS = (
    "Values of {measure} are means over {seeds} seeds of each training, intervals are over seeds and test images. "
    "Another number of threads or another device can choose another network of about the same {measure}."
)


def result(run: RunContent) -> Iterator[Markup]:
    """The closing table, its main numbers and a sentence."""
    rows = dict(run.closing)
    if not rows and run.phase("teacher"):
        rows = {"teacher": run.phase("teacher")}
    if not run.closing and not {"grow", "prune"} & set(run.job()):
        yield missing("The closing table needs a retrained student.", commands(run)["retrain"][1])
    sentence = verdict(rows, run.controls, run.measure)
    if sentence:
        yield tag("p", sentence, class_="lead")
        if lost := mapping(run.controls.get("points lost")).get("sentence"):
            yield tag("p", str(lost), class_="lead")
        seeds = len(listed(mapping(rows.get("student")).get("seeds")))
        words = (_SEEDS if seeds > 1 else _SEED).format(seeds=seeds, measure=run.measure)
        yield tag("p", words, class_="soft")
    for words in (_removal(run.phase("removal")), _chosen(run.phase("choice")), _members(run.phase("grow"))):
        if words:
            yield tag("p", words)
    tiles = list(_tiles(rows, sum(seconds for seconds, _ in run.seconds().values()), run.measure))
    if tiles:
        yield tag(
            "div",
            *(tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in tiles),
            class_="tiles",
        )
    if rows:
        most = finite(mapping(rows.get("teacher")).get("macs"))
        balances = any("balanced_accuracy" in row for row in rows.values())
        columns = [
            Column("Network", text, numeric=False),
            Column(f"Test {run.measure}", accuracy),
            *[Column("Balanced over classes", accuracy)] * balances,
            Column("Params", whole),
            Column("MACs", whole),
            Column("of the teacher's MACs", percent),
            Column("Time", duration),
        ]
        lines = []
        for name, row in rows.items():
            macs = finite(row.get("macs"))
            share = macs / most if macs is not None and most else None
            accuracies = (row.get("accuracy"), *[row.get("balanced_accuracy")] * balances)
            lines.append((network_name(name), *accuracies, row.get("params"), macs, share, row.get("seconds")))
        marked = [i for i, name in enumerate(rows) if name == "student"]
        yield table(columns, lines, marked=marked)
    details = {name: measures for name, row in rows.items() if (measures := mapping(row.get("measures")))}
    if details:
        names = list(dict.fromkeys(key for measures in details.values() for key in measures))
        yield tag("h3", "Further measures on the test images")
        yield table(
            [Column("Measure", text, numeric=False), *(Column(network_name(name), accuracy) for name in details)],
            [(name, *(measures.get(name) for measures in details.values())) for name in names],
        )
    chart = _compared(run, rows)
    if chart is not None:
        yield chart


def _removal(removal: JsonObject) -> str:
    """A pruning's removal, in words."""
    before, after = mapping(removal.get("whole")), mapping(removal.get("left"))
    if not (before and after):
        return ""
    how = (
        f"{whole(removal.get('zeros'))} of {whole(removal.get('factors'))} scale factors became exactly 0. What is left"
        if "zeros" in removal
        else f"{whole(removal.get('candidates'))} removals were scored under the network itself. The best of them"
    )
    return (
        f"{how} has {whole(after.get('params'))} params and {whole(after.get('macs'))} MACs of "
        f"{whole(before.get('params'))} params and {whole(before.get('macs'))} MACs, and reaches "
        f"{accuracy(removal.get('accuracy'))} of the search part before it is retrained."
    )


def _chosen(choice: JsonObject) -> str:
    """Which removal a pruning's student is of, in words."""
    reached = mapping(choice.get("reached"))
    if not reached:
        return ""
    texts = ", ".join(f"{name} {accuracy(value)}" for name, value in reached.items())
    return f"The student is of {choice.get('removal')} removal, the best on the search part when retrained: {texts}."


def _members(growth: JsonObject) -> str:
    """An ensemble's members and their weights, in words."""
    codes, weights = growth.get("members"), growth.get("weights")
    if not (isinstance(codes, list) and isinstance(weights, list) and len(codes) == len(weights)):
        return ""
    members = ", ".join(f"{code} ({decimal(weight)})" for code, weight in zip(codes, weights, strict=True))
    return f"The ensemble's members, with their weights: {members}."


def _accuracies(rows: Mapping[str, JsonObject]) -> list[float | None]:
    return [finite(mapping(rows.get(name)).get("accuracy")) for name in ("teacher", "student", "control")]


def verdict(rows: Mapping[str, JsonObject], controls: Mapping[str, JsonObject], measure: str = "accuracy") -> str:
    """One sentence on what the teacher was good for, from the closing table and the interval of the difference."""
    teacher, student, control = _accuracies(rows)
    if student is None:
        return ""
    reaches = f"the student reaches {accuracy(student)} test {measure}"
    if control is None:
        below = "" if teacher is None else f", {_points(student - teacher)} {_side(student - teacher)} its teacher"
        return f"{reaches[0].upper()}{reaches[1:]}{below}."
    bounds = listed(mapping(controls.get("distillation")).get("interval"))
    ends = [end for end in map(finite, bounds) if end is not None]
    low, high = ends if len(ends) == 2 else (0.0, 0.0)
    interval = f" [{_signed_points(low)}, {_signed_points(high)}]" if len(ends) == 2 else ""
    gain = student - control
    if low > 0 or high < 0:
        told = "Distillation helped" if low > 0 else "Distillation did not help"
        interval = f" [{_signed_points(low)}, {_signed_points(high)}]"
        return (
            f"{told}: {reaches}, {_points(gain)}{interval} {_side(gain)} the same network trained without the teacher."
        )
    return (
        f"Whether distillation helped cannot be told from these test images: {reaches}, the same network without the "
        f"teacher {accuracy(control)}, a difference of {_signed_points(gain)} points{interval}."
    )


def _side(difference: float) -> str:
    return "above" if difference > 0 else "below"


def _signed_points(difference: float) -> str:
    return f"{100 * difference:+.2f}".replace("-", "−")


def _compared(run: RunContent, rows: Mapping[str, JsonObject]) -> Markup | None:
    """The accuracy of the student and of its controls over their training, in one chart."""
    phases = {name: str(row.get("training", name)) for name, row in rows.items() if name != "teacher"}
    series = {network_name(name): pairs for name, phase in phases.items() if (pairs := run.accuracies(phase))}
    if len(series) < 2:
        return None
    end = max(finite(run.metrics[phase][-1].get("total")) or 0 for phase in phases.values() if phase in run.metrics)
    chart = curves(series, x_label="step", y_label=f"{run.measure} on the search part", y_unit="%", x_end=end)
    return join([tag("h3", "The student against its controls"), chart])


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.2f} points"


def _tiles(rows: Mapping[str, JsonObject], seconds: float, measure: str) -> Iterator[tuple[str, str]]:
    teacher, student, control = _accuracies(rows)
    large, small = (finite(mapping(rows.get(name)).get("macs")) for name in ("teacher", "student"))
    if student is not None:
        yield (
            accuracy(student),
            f"student's test {measure}" + (f"; teacher {accuracy(teacher)}" if teacher is not None else ""),
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
    first = [c for name, c in run.controls.items() if not name.startswith("tau ")]
    taus = {name: c for name, c in run.controls.items() if name.startswith("tau ")}
    if first:
        yield tag("div", *_sentences(first), class_="honest")
    if taus:
        columns = [
            Column("Kendall's tau of the score with", text, numeric=False),
            Column("Value", _three_digits),
            Column("95 % interval", _interval),
        ]
        rows = [(name.removeprefix("tau "), c.get("value"), c.get("interval")) for name, c in taus.items()]
        summary = tag("summary", f"Does the score say more than size? Its agreement with {len(taus)} simple scores")
        yield tag("details", summary, table(columns, rows), *_sentences(taus.values()))


def _sentences(controls: Iterable[JsonObject]) -> list[Markup]:
    return [tag("p", str(control["sentence"])) for control in controls if control.get("sentence")]


def _three_digits(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:,.3f}".replace("-", "−")


def _interval(value: Any) -> str:
    ends = [finite(v) for v in value] if isinstance(value, list) else []
    return f"{_three_digits(ends[0])} to {_three_digits(ends[1])}" if len(ends) == 2 and None not in ends else "–"
