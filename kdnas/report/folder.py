"""What a run folder holds so far, whatever is missing, cut short or of an unexpected kind."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from kdnas.report.markup import finite
from kdnas.runs.entry import CONTRAST, RANDOM

Record = dict[str, Any]


@final
@dataclass(frozen=True)
class Search:
    """The distinct architectures of one `kdnas search`, best first.

    Attributes:
        number: the how manieth search of the run.
        rows: lines of the ranking, in the order of `ranked`, those without a score last; of several with one code the
            last.
        num_evaluations: lines, repetitions included.
    """

    number: int
    rows: tuple[Record, ...]
    num_evaluations: int

    def said(self, key: str) -> str:
        """A value that all rows share, such as the scorer's name."""
        return str(next((row[key] for row in self.rows if key in row), "–"))

    def place_of(self, architecture: Any) -> int | None:
        """Index of an architecture, or None."""
        found = (i for i, row in enumerate(self.rows) if row.get("architecture") == architecture)
        return next(found, None)


@final
@dataclass(frozen=True)
class Found:
    """Everything a report shows, read once.

    Attributes:
        name: the run folder as the user wrote it.
        run: `run.json`, empty if there is none.
        metrics: per phase its lines by ascending step; of several with one step, as after a resumption, the last.
        searches: in their order.
        closing: rows of the closing table, by name.
        controls: by name.
        students: by name, `student.json`; the one of the closing table first.
        why: the last explained architecture, empty if there is none.
        problems: sentences on what could not be read.
    """

    name: str
    run: Record
    metrics: Mapping[str, list[Record]]
    searches: tuple[Search, ...]
    closing: Mapping[str, Record]
    controls: Mapping[str, Record]
    students: Mapping[str, Record]
    why: Record
    problems: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What there is in the folder."""
        problems: list[str] = []
        results = _object(folder / "results.json", problems)
        rows = next((v for v in results.values() if isinstance(v, list)), [])
        # A folder with a dot is one that is being written.
        paths = sorted(
            folder.glob("students/[!.]*/student.json"), key=lambda path: (path.parent.name != "student", path)
        )
        students = {path.parent.name: _object(path, problems) for path in paths}
        return cls(
            str(folder),
            _object(folder / "run.json", problems),
            _by_phase(_lines(folder / "metrics.jsonl", problems)),
            _searches(_lines(folder / "ranking.jsonl", problems)),
            {str(row["name"]): row for row in rows if isinstance(row, dict) and "name" in row},
            {n: c for n, c in mapping(results.get("controls")).items() if isinstance(c, dict)},
            students,
            _object(folder / "why.json", problems),
            tuple(problems),
        )

    def phase(self, name: str) -> Record:
        """What `run.json` says of a phase; empty until it ended."""
        return mapping(mapping(self.run.get("phases")).get(name))

    def budget(self) -> dict[str, float]:
        """The bounds of the last search, or else of the job."""
        bounds = self.phase("search").get("budget") or mapping(self.run.get("job")).get("budget")
        numbers = {name: finite(bound) for name, bound in mapping(bounds).items()}
        return {name: bound for name, bound in numbers.items() if bound is not None}

    def seconds(self) -> dict[str, tuple[float, bool]]:
        """Per phase the seconds it took, and whether it ended; those of one that has not are from its last line."""
        phases: dict[str, tuple[float, bool]] = {}
        for name in mapping(self.run.get("phases")):
            taken = finite(self.phase(name).get("seconds"))
            # A growth's are the sum of its members', which have lines of their own.
            if taken is not None and name != "grow":
                phases[name] = (taken, True)
        for name, lines in self.metrics.items():
            taken, total = finite(lines[-1].get("seconds")), finite(lines[-1].get("total"))
            if name not in phases and taken is not None:
                phases[name] = (taken, total is not None and lines[-1]["step"] + 1 >= total)
        scored = [finite(row.get("seconds")) or 0.0 for search in self.searches for row in search.rows]
        if "search" not in phases and scored:
            phases["search"] = (sum(scored), False)
        return phases


def mapping(value: Any) -> Record:
    """The value if it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def _object(path: Path, problems: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} cannot be read ({error}); it is left out.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object; it is left out.")
    return mapping(value)


def _lines(path: Path, problems: list[str]) -> list[Record]:
    if not path.is_file():
        return []
    held, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            held.append(value)
        else:
            broken += 1
    if broken:
        problems.append(f"{path.name}: {broken} of {broken + len(held)} lines cannot be read and are left out.")
    return held


def _by_phase(lines: list[Record]) -> dict[str, list[Record]]:
    phases: dict[str, dict[float, Record]] = {}
    for line in lines:
        step = finite(line.get("step"))
        if step is not None:
            phases.setdefault(str(line.get("phase", "–")), {})[step] = line
    return {phase: [steps[s] for s in sorted(steps)] for phase, steps in phases.items()}


def _searches(lines: list[Record]) -> tuple[Search, ...]:
    found: dict[int, list[Record]] = {}
    for line in lines:
        # Controls are not ranked: export counts places without them, and the contrast's scores are another scorer's.
        if ("score" in line or "architecture" in line) and line.get("searcher") not in (CONTRAST, RANDOM):
            found.setdefault(int(finite(line.get("search")) or 0), []).append(line)
    return tuple(Search(number, _ranked(rows), len(rows)) for number, rows in sorted(found.items()))


def _ranked(rows: list[Record]) -> tuple[Record, ...]:
    distinct = {str(row.get("code") or json.dumps(row.get("architecture"), sort_keys=True)): row for row in rows}

    def key(item: tuple[str, Record]) -> tuple[bool, float, float, float, str]:
        score, macs = finite(item[1].get("score")), finite(item[1].get("macs"))
        share = finite(item[1].get("share", 1.0))
        return score is None, -(share or 0.0), -(score or 0.0), -(macs or 0.0), item[0]

    return tuple(row for _, row in sorted(distinct.items(), key=key))
