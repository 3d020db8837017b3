"""The report of a run as one HTML file."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdnas.report.candidates import front, ranking, students
from kdnas.report.charts import bars, curves
from kdnas.report.comparison import write_comparison
from kdnas.report.content import RunContent, mapping, steps_of
from kdnas.report.explained import explanation
from kdnas.report.finalists import finalists
from kdnas.report.markup import (
    Column,
    accuracy,
    decimal,
    document,
    duration,
    finite,
    percent,
    table,
    tag,
    text,
    title,
    whole,
    write_page,
)
from kdnas.report.names import loss_name, phase_name
from kdnas.report.outcome import controls, result
from kdnas.report.pictures import pictures
from kdnas.report.todo import commands, missing, next_command
from kdnas.runs.folder import COMPARISON, MANIFEST, JsonObject
from kdnas.statistics import share_sentence

_HIGH = 1000.0


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, or a comparison's, from the folder's own files, and return its path.

    The page needs no network, no script and no other file. Missing parts of the run are named with the
    commands for them. Equal folders give equal pages.

    Raises:
        ValueError: there is no such folder.
    """
    if not run_folder.is_dir():
        raise ValueError(
            f"a report is written into an existing run folder, {str(run_folder)!r} does not exist. "
            f"Create one: kdnas train EXPERIMENT --out {shlex.quote(str(run_folder))}"
        )
    if (run_folder / COMPARISON).exists():
        return write_comparison(run_folder)
    return write_page(run_folder, _page(RunContent.read(run_folder)))


def _page(run: RunContent) -> str:
    sections = [
        ("result", "Result", result(run)),
        ("controls", "Is it better than chance, and than size?", controls(run)),
        ("student", "The student", students(run)),
        ("front", "Score against cost", front(run)),
        ("ranking", "Ranking", ranking(run)),
        ("training", "Training", _training(run)),
        ("time", "Cost and time per phase", _time(run)),
        ("settings", "Settings", _settings(run)),
    ]
    name = Path(run.name).name or run.name
    if run.pictures:
        sections.insert(1, ("pictures", "What it sees", pictures(run)))
    if run.phase("finals"):
        sections.insert(2, ("finalists", "Finalists", finalists(run)))
    if run.why:
        sections.insert(3, ("why", "Why this score", explanation(run)))
    todo = next_command(run)
    job = run.job()
    for kind, absent, last in (
        ("grow", ("front", "ranking", "student"), "grow"),
        ("prune", ("front", "ranking"), "random"),
    ):
        if kind in job:
            # No supernet, ranking or export is missing there.
            sections = [s for s in sections if s[0] not in absent]
            command = f"kdnas {kind} … --out {shlex.quote(run.name)}"
            todo = None if run.phase(last) else ("This run is not finished; the same command resumes it.", command)
    notes = [missing(*todo, "Next")] if todo else []
    notes += [tag("p", problem, class_="missing") for problem in run.problems]
    return document(f"kdnas report: {name}", name, [tag("p", _origin(run.manifest), class_="soft")], sections, notes)


def _origin(manifest: JsonObject) -> str:
    if not manifest:
        return "No run is recorded in this folder."
    parts = [str(manifest["created"])] if "created" in manifest else []
    parts += [f"seed {manifest['seed']}"] if "seed" in manifest else []
    parts += [f"{name} {manifest[name]}" for name in ("kdnas", "torch") if name in manifest]
    parts += [f"Python {manifest['python']}"] if "python" in manifest else []
    parts += [f"commit {str(manifest['commit'])[:12]}"] if manifest.get("commit") else []
    return " · ".join(parts)


def _training(run: RunContent) -> Iterator[Markup]:
    if not run.metrics:
        yield missing(*commands(run)["train"])
    for phase, lines in run.metrics.items():
        if "-seed-" in phase:  # they look like the first seed's
            continue
        yield tag("h3", phase_name(phase))
        last = lines[-1]
        total = finite(last.get("total"))
        end = total or lines[-1]["step"]
        rates = [r for r in (finite(line.get("lr")) for line in lines) if r is not None]
        words = f"Step {whole(steps_of(last))}" + (f" of {whole(total)}" if total else "")
        words += f" after {duration(last.get('seconds'))}" if finite(last.get("seconds")) is not None else ""
        words += f"; learning rate {max(rates):.3g} at most, {rates[-1]:.3g} at the end" if rates else ""
        yield tag("p", words + ".", class_="soft")
        losses = _series(lines, lambda line: mapping(line.get("losses")))
        losses = {loss_name(name, phase): series for name, series in losses.items()}
        accuracies = _series(lines, lambda line: {**mapping(line.get("health")), run.measure: line.get("accuracy")})
        charts = [curves(losses, x_label="step", y_label="loss", x_end=end)] if losses else []
        charts += [curves(accuracies, x_label="step", y_label=run.measure, y_unit="%", x_end=end)] if accuracies else []
        terms = _series(
            lines, lambda line: {n: mapping(t).get("gradient") for n, t in mapping(line.get("terms")).items()}
        )
        if len(terms) > 1:
            charts.append(curves(terms, x_label="step", y_label="share of the gradient", y_unit="%", x_end=end))
        traces = _series(lines, lambda line: mapping(line.get("trace")))
        charts += [curves({name: s}, x_label="networks", y_label=name, x_end=end) for name, s in traces.items()]
        yield tag("div", *charts, class_="pair")
        shares = [share_sentence(name, series[-1][1], len(terms)) for name, series in terms.items()]
        for sentence in (_highest(losses, end), *shares):
            if sentence:
                yield tag("p", sentence[0].upper() + sentence[1:], class_="missing")
        num_omitted = sum(1 for line in lines for v in mapping(line.get("losses")).values() if finite(v) is None)
        if num_omitted:
            sentence = f"{num_omitted:,} logged losses are not finite and are left out of the curve."
            yield tag("p", sentence, class_="missing")


def _highest(losses: Mapping[str, Sequence[tuple[float, float]]], end: float) -> str:
    """A sentence on a loss that was far above its end, with what it means; empty where none was."""
    tops = {name: max(pairs, key=lambda pair: pair[1]) for name, pairs in losses.items()}
    far = {n: top for n, top in tops.items() if top[1] > _HIGH and top[1] > _HIGH * abs(losses[n][-1][1])}
    if not far:
        return ""
    name, (step, value) = max(far.items(), key=lambda item: item[1][1])
    return (
        f"The loss of {name} was {whole(value)} at step {whole(step)} of {whole(end)}, and at the end "
        f"{decimal(losses[name][-1][1])}. Untrained subnets differ from the teacher by many orders of magnitude in "
        "terms that grow with the exponential or the square of the outputs; gradients are clipped, so that single "
        "steps do no harm. A loss that stays there has diverged: lower the learning rate."
    )


def _series(
    lines: Sequence[JsonObject], pick: Callable[[JsonObject], JsonObject]
) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in pick(line).items():
            if finite(value) is not None:
                series.setdefault(str(name), []).append((line["step"], value))
    return series


def _time(run: RunContent) -> Iterator[Markup]:
    phases = run.seconds()
    if not phases:
        yield missing("No phase has ended yet.", commands(run)["train"][1])
        return
    names = {p: phase_name(p) + ("" if ended else " (so far)") for p, (_, ended) in phases.items()}
    chart = bars({names[p]: seconds for p, (seconds, _) in phases.items()}, write=duration)
    total = sum(seconds for seconds, _ in phases.values())
    columns = [
        Column("Phase", text, numeric=False),
        Column("Time", duration),
        Column("of the whole", percent),
        Column("Steps", whole),
        Column(title(run.measure), accuracy),
        Column("Params", whole),
        Column("MACs", whole),
    ]
    rows = []
    for phase, (seconds, _) in phases.items():
        record = run.phase(phase)
        steps = record.get("steps") or steps_of(run.metrics.get(phase, [{}])[-1])
        share = seconds / total if total else None
        rows.append((names[phase], seconds, share, steps, *(record.get(k) for k in ("accuracy", "params", "macs"))))
    rows.append(("All", total, 1.0, None, None, None, None))
    yield chart
    yield table(columns, rows)


def _settings(run: RunContent) -> Iterator[Markup]:
    job = run.job()
    if not job:
        yield missing(f"The settings are in {MANIFEST}, which does not exist yet.", commands(run)["train"][1])
        return
    columns = [Column("Setting", text, numeric=False, code=True), Column("Value", text, numeric=False, code=True)]
    summary = tag("summary", f"All settings of the run ({len(job)} fields)")
    yield tag("details", summary, table(columns, list(_flat(job))))


def _flat(value: JsonObject, before: str = "") -> Iterator[tuple[str, str]]:
    for name, setting in value.items():
        if isinstance(setting, dict) and setting and "make" not in setting:
            yield from _flat(setting, f"{before}{name}.")
        else:
            yield f"{before}{name}", _call(setting)


def _call(value: Any) -> str:
    """A JSON value as text; a spec as a call."""
    if isinstance(value, dict) and "make" in value:
        inner = ", ".join(f"{n}={_call(v)}" for n, v in mapping(value.get("arguments")).items())
        return f"{str(value['make']).rpartition(':')[2]}({inner})"
    if isinstance(value, list):
        return "(" + ", ".join(_call(v) for v in value) + ")"
    return str(value)
