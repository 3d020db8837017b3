"""The content of a run folder for a report; missing, damaged or mistyped parts are left out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from kdnas.ranking.order import order_key
from kdnas.report.markup import finite
from kdnas.runs.entry import CONTROL_SEARCHERS
from kdnas.runs.folder import CARD, METRICS, PICTURES, RANKING, STUDENTS, WHY, JsonObject, RunFolder


@final
@dataclass(frozen=True)
class SearchRanking:
    """The distinct architectures of one `kdnas search`, best first.

    Attributes:
        number: 1-based index of the search within the run.
        rows: lines of `ranking.jsonl` in the order of `ranked`, those without a score last; of several lines with one
            code the last.
        num_evaluations: lines, repetitions included.
    """

    number: int
    rows: tuple[JsonObject, ...]
    num_evaluations: int

    @classmethod
    def of(cls, number: int, lines: Sequence[JsonObject]) -> Self:
        """The ranking of the lines of one search."""
        rows = {str(line.get("code") or json.dumps(line.get("architecture"), sort_keys=True)): line for line in lines}

        def key(row: tuple[str, JsonObject]) -> tuple[bool, float, float, float, str]:
            code, line = row
            share = finite(line.get("share", 1.0))
            return order_key(code, finite(line.get("score")), share, finite(line.get("macs")))

        return cls(number, tuple(line for _, line in sorted(rows.items(), key=key)), len(lines))

    def common(self, key: str) -> str:
        """A value that all rows share, such as the scorer's name."""
        return str(next((row[key] for row in self.rows if key in row), "–"))

    def index_of(self, architecture: Any) -> int | None:
        """Index of an architecture, or None."""
        indices = (i for i, row in enumerate(self.rows) if row.get("architecture") == architecture)
        return next(indices, None)


@final
@dataclass(frozen=True)
class RunContent:
    """Everything a report shows, read once.

    Attributes:
        name: the run folder as the user wrote it; of an absolute path the last part, since the report is in the folder.
        manifest: `run.json`, empty if there is none.
        metrics: per phase its lines by ascending step; of several with one step, as after a resumption, the last.
        rankings: one per search, in their order.
        closing: rows of the closing table, by name.
        controls: by name.
        students: by name, `student.json`; the one of the closing table first.
        why: the last explained architecture, empty if there is none.
        pictures: test images and what networks answer, empty if there are none.
        problems: sentences on what could not be read.
    """

    name: str
    manifest: JsonObject
    metrics: Mapping[str, list[JsonObject]]
    rankings: tuple[SearchRanking, ...]
    closing: Mapping[str, JsonObject]
    controls: Mapping[str, JsonObject]
    students: Mapping[str, JsonObject]
    why: JsonObject
    pictures: JsonObject
    problems: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What there is in the folder."""
        run = RunFolder(folder, strict=False)
        results = run.results()
        rows = results["rows"] if isinstance(results["rows"], list) else []
        # A folder with a dot is one that is being written.
        cards = sorted(folder.glob(f"{STUDENTS}/[!.]*/{CARD}"), key=lambda path: (path.parent.name != "student", path))
        return cls(
            name=folder.name if folder.is_absolute() else str(folder),
            manifest=run.manifest,
            metrics=_by_phase(run.lines(METRICS)),
            rankings=_rankings(run.lines(RANKING)),
            closing={str(row["name"]): row for row in rows if isinstance(row, dict) and "name" in row},
            controls={n: c for n, c in mapping(results["controls"]).items() if isinstance(c, dict)},
            students={path.parent.name: run.read(str(path.relative_to(folder))) for path in cards},
            why=run.read(WHY),
            pictures=run.read(PICTURES),
            problems=tuple(run.problems),
        )

    def phase(self, name: str) -> JsonObject:
        """What `run.json` records of a phase; empty until it ended."""
        return mapping(mapping(self.manifest.get("phases")).get(name))

    def job(self) -> JsonObject:
        """The settings in `run.json`."""
        return mapping(self.manifest.get("job"))

    def budget(self) -> dict[str, float]:
        """The bounds of the last search, or else of the job."""
        bounds = self.phase("search").get("budget") or self.job().get("budget")
        numbers = {name: finite(bound) for name, bound in mapping(bounds).items()}
        return {name: bound for name, bound in numbers.items() if bound is not None}

    @property
    def measure(self) -> str:
        """Name of what `accuracy` in the files is: the measure of the run's task."""
        return str(self.manifest.get("measure", "accuracy"))

    def accuracies(self, phase: str) -> list[tuple[float, float]]:
        """Step and measure on the search part over a training; empty where there are none."""
        lines = self.metrics.get(phase, [])
        return [(line["step"], value) for line in lines if (value := finite(line.get("accuracy"))) is not None]

    def seconds(self) -> dict[str, tuple[float, bool]]:
        """Per phase the seconds it took, and whether it ended; those of one that has not are from its last line."""
        phases: dict[str, tuple[float, bool]] = {}
        for name in mapping(self.manifest.get("phases")):
            seconds = finite(self.phase(name).get("seconds"))
            # A growth's are the sum of its members', which have lines of their own.
            if seconds is not None and name != "grow":
                phases[name] = (seconds, True)
        chosen = {row.get("name") for row in map(mapping, listed(self.phase("finals").get("rows")))}
        for name, lines in self.metrics.items():
            seconds, total = finite(lines[-1].get("seconds")), finite(lines[-1].get("total"))
            if name not in phases and seconds is not None:
                phases[name] = (seconds, name in chosen or (total is not None and (steps_of(lines[-1]) or 0) >= total))
        scored = [finite(row.get("seconds")) or 0.0 for ranking in self.rankings for row in ranking.rows]
        if "search" not in phases and scored:
            phases["search"] = (sum(scored), False)
        return phases


def steps_of(line: JsonObject) -> float | None:
    """How many steps were taken by a line of `metrics.jsonl`, which counts a training's steps from 0; or None."""
    step = finite(line.get("step"))
    return step + 1 if step is not None and finite(line.get("total")) is not None else step


def mapping(value: Any) -> JsonObject:
    """The value if it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """A list from a file, or an empty one where there is something else."""
    return value if isinstance(value, list) else []


def _by_phase(lines: list[JsonObject]) -> dict[str, list[JsonObject]]:
    phases: dict[str, dict[float, JsonObject]] = {}
    for line in lines:
        step = finite(line.get("step"))
        if step is not None:
            phases.setdefault(str(line.get("phase", "–")), {})[step] = line
    return {phase: [steps[s] for s in sorted(steps)] for phase, steps in phases.items()}


def _rankings(lines: list[JsonObject]) -> tuple[SearchRanking, ...]:
    searches: dict[int, list[JsonObject]] = {}
    for line in lines:
        # Controls are not ranked: export counts places without them, and the contrast's scores are another scorer's.
        if ("score" in line or "architecture" in line) and line.get("searcher") not in CONTROL_SEARCHERS:
            searches.setdefault(int(finite(line.get("search")) or 0), []).append(line)
    return tuple(SearchRanking.of(number, searches[number]) for number in sorted(searches))
