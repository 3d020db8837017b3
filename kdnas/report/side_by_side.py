"""Several runs in one page: students, rankings, costs, and the settings in which they differ."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdnas.report.charts import Point, bars, curves, scatter
from kdnas.report.content import RunContent, mapping
from kdnas.report.markup import (
    Column,
    accuracy,
    decimal,
    document,
    duration,
    finite,
    percent,
    scaled,
    table,
    tag,
    text,
    title,
    whole,
)
from kdnas.report.names import phase_name
from kdnas.runs.files import write_atomically
from kdnas.runs.folder import JsonObject
from kdnas.statistics import kendall, wilson

_Runs = Mapping[str, RunContent]


def write_side_by_side(folders: Sequence[Path], path: Path) -> Path:
    """Write a page that compares runs, from their folders' own files, and return its path.

    Args:
        folders: of the runs, each once.
        path: of the page.

    Raises:
        ValueError: a folder is named twice, or the page would lie where there is a folder.
    """
    names = _names(folders)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give --out a file such as {path / 'runs.html'}.")
    runs = {name: RunContent.read(folder) for name, folder in zip(names, folders, strict=True)}
    sections = [
        ("students", "Students", _students(runs)),
        ("cost", f"{title(measure_of(runs))} against cost", _cost(runs)),
        ("rankings", "Rankings", _rankings(runs)),
        ("training", "Students during their training", _trainings(runs)),
        ("time", "Time", _times(runs)),
        ("settings", "Settings that differ", _settings(runs)),
    ]
    notes = [tag("p", f"{name}: {problem}", class_="missing") for name, run in runs.items() for problem in run.problems]
    intro = tag("p", f"{len(runs)} runs: {', '.join(names)}", class_="soft")
    page = document("kdnas: several runs", "Runs side by side", [intro], sections, notes)
    write_atomically(path, lambda draft: draft.write_bytes(page.encode("utf-8", "replace")))
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many folders above as tell them apart."""
    places = [folder.resolve() for folder in folders]
    twice = next((folder for i, folder in enumerate(places) if folder in places[:i]), None)
    if twice is not None:
        raise ValueError(f"runs that are compared must differ, got {twice} twice. Name each once.")
    for depth in itertools.count(1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len({*names}) == len(names):
            return names
    raise AssertionError


def measure_of(runs: _Runs) -> str:
    """What the runs' students are measured by, several joined."""
    measures = dict.fromkeys(run.measure for run in runs.values() if "student" in run.closing)
    return " or ".join(measures or ["accuracy"])


def _num_tested(run: RunContent) -> int:
    """Number of test images, from the fingerprint of the data; 0 if unknown."""
    count = str(mapping(run.manifest.get("data")).get("test", "")).partition(" ")[0]
    return int(count) if count.isdecimal() else 0


def _interval(run: RunContent, row: JsonObject) -> str:
    value, count, own = finite(row.get("accuracy")), _num_tested(run), row.get("interval")
    if value is None:
        return "–"
    if isinstance(own, list) and len(own) == 2 and None not in map(finite, own):
        low, high = own
    elif run.measure == "accuracy" and count and 0 <= value <= 1:
        low, high = wilson(value * count, count)
    else:
        return "–"
    return f"{percent(low)} to {percent(high)}"


def _students(runs: _Runs) -> Iterator[Markup]:
    columns = [
        Column("Run", text, numeric=False),
        Column("Student", accuracy),
        Column("95 % interval", text, numeric=False),
        Column("Teacher", accuracy),
        Column("Without a teacher", accuracy),
        Column("Params", scaled),
        Column("MACs", scaled),
        Column("Time of the run", duration),
    ]
    rows = []
    for name, run in runs.items():
        student = mapping(run.closing.get("student"))
        others = [mapping(run.closing.get(row)).get("accuracy") for row in ("teacher", "control")]
        spent = sum(seconds for seconds, _ in run.seconds().values())
        costs = (student.get("params"), student.get("macs"), spent)
        rows.append((name, student.get("accuracy"), _interval(run, student), *others, *costs))
    rows.sort(key=lambda row: (-(finite(row[1]) or -1.0), row[0]))
    yield table(columns, rows, marked=[0] if finite(rows[0][1]) is not None else [])
    tests = {str(mapping(run.manifest.get("data")).get("test")) for run in runs.values()}
    measure = measure_of(runs)
    if len(tests) > 1 or " or " in measure:
        what = "tested on different images" if len(tests) > 1 else f"measured by {measure}"
        words = f"The runs were {what}, so that their students cannot be compared."
        yield tag("p", words, class_="missing")
    else:
        how = "Wilson" if measure == "accuracy" else "bootstrap"
        words = (
            f"Intervals are over test images ({how}). Runs whose intervals overlap are not distinguishable by them; "
            "runs of several seeds say more."
        )
        yield tag("p", words, class_="soft")


def _cost(runs: _Runs) -> Iterator[Markup]:
    rows = {name: mapping(run.closing.get("student")) for name, run in runs.items()}
    points = [
        Point(
            float(row["macs"]), float(row["accuracy"]), f"{name}: {percent(row['accuracy'])}, {whole(row['macs'])} MACs"
        )
        for name, row in rows.items()
        if finite(row.get("macs")) is not None and finite(row.get("accuracy")) is not None
    ]
    if not points:
        yield tag("p", "No run has a student yet.", class_="missing")
        return
    yield scatter(points, x_label="MACs", y_label=f"Test {measure_of(runs)}", y_unit="%")


def _scores(run: RunContent) -> dict[str, float]:
    """Code to score of the last search."""
    rows = run.rankings[-1].rows if run.rankings else ()
    return {str(row.get("code")): score for row in rows if (score := finite(row.get("score"))) is not None}


def _rankings(runs: _Runs) -> Iterator[Markup]:
    columns = [
        Column("Run", text, numeric=False),
        Column("Searcher", text, numeric=False),
        Column("Score", text, numeric=False),
        Column("Candidates", whole),
        Column("First place", text, numeric=False, code=True),
        Column("Its score", decimal),
        Column("Its MACs", scaled),
    ]
    rows = []
    for name, run in runs.items():
        if run.rankings and run.rankings[-1].rows:
            last = run.rankings[-1]
            best = last.rows[0]
            kinds = (last.common("searcher"), last.common("scorer"))
            rows.append((name, *kinds, len(last.rows), best.get("code"), best.get("score"), best.get("macs")))
    if not rows:
        yield tag("p", "No run has a ranking yet.", class_="missing")
        return
    yield table(columns, rows)
    pairs = []
    for (one, first), (other, second) in itertools.combinations(runs.items(), 2):
        scores, others = _scores(first), _scores(second)
        common = sorted(scores.keys() & others.keys())
        if len(common) > 2:
            tau = kendall([scores[code] for code in common], [others[code] for code in common])
            pairs.append((one, other, len(common), tau))
    if pairs:
        names = [Column("Run", text, numeric=False), Column("and run", text, numeric=False)]
        yield table(
            [*names, Column("Networks in both", whole), Column("Kendall's tau of their scores", decimal)], pairs
        )


def _trainings(runs: _Runs) -> Iterator[Markup]:
    series = {}
    for name, run in runs.items():
        training = str(run.phase("student").get("training", "student"))
        if points := run.accuracies(training):
            series[name] = points
    if series:
        yield curves(series, x_label="step", y_label=f"{measure_of(runs)} on the search part", y_unit="%")
    else:
        yield tag("p", "No student was trained yet.", class_="missing")


def _times(runs: _Runs) -> Iterator[Markup]:
    seconds = {name: {phase: spent for phase, (spent, _) in run.seconds().items()} for name, run in runs.items()}
    totals = {name: sum(phases.values()) for name, phases in seconds.items() if phases}
    if totals:
        yield bars(totals, write=duration)
    phases = list(dict.fromkeys(phase for each in seconds.values() for phase in each if "-" not in phase))
    columns = [Column("Run", text, numeric=False), *(Column(phase_name(phase), duration) for phase in phases)]
    yield table(columns, [(name, *map(each.get, phases)) for name, each in seconds.items()])


def _settings(runs: _Runs) -> Iterator[Markup]:
    settings = {name: dict(flat(run.job())) for name, run in runs.items()}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    differing = [key for key in keys if len({each.get(key) for each in settings.values()}) > 1]
    if not differing:
        yield tag("p", "None: all settings are equal.", class_="soft")
        return
    columns = [Column("Setting", text, numeric=False, code=True)]
    columns += [Column(name, text, numeric=False, code=True) for name in runs]
    yield table(columns, [(key, *(each.get(key) for each in settings.values())) for key in differing])


def flat(value: JsonObject, before: str = "") -> Iterator[tuple[str, str]]:
    """Path and value of every setting, specs taken apart, so that what differs is as small as can be."""
    for name, setting in value.items():
        if isinstance(setting, dict) and setting:
            yield from flat(setting, f"{before}{name}.")
        else:
            yield f"{before}{name}", setting if isinstance(setting, str) else _plain(setting)


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)
