"""A run: a folder that any later command can open."""

import errno
import json
import logging
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, NotRequired, TypedDict, final

from kdnas.plain import printable_content
from kdnas.runs.entry import Entry
from kdnas.runs.files import (
    Damaged,
    Fields,
    append_lines,
    check_format,
    parse_json,
    plain,
    read_bytes,
    read_json,
    signed,
    write_atomically,
    write_json,
    write_text,
)
from kdnas.runs.lock import Busy, hold, is_lock
from kdnas.runs.places import by_name, digests, forget, located, moved, name_again, portable, settle, weights_digest
from kdnas.runs.schema import mismatch
from kdnas.trust import admit, check_links, leads_out, remember
from kdnas.values import Amount, Count, Index, Seed

_log = logging.getLogger(__name__)

# The files of a run folder.
MANIFEST, METRICS, RANKING, RESULTS = "run.json", "metrics.jsonl", "ranking.jsonl", "results.json"
CHECKPOINT, TEACHER, STUDENTS, REPORT = "checkpoint.safetensors", "teacher", "students", "report.html"
SNAPSHOTS, MEMBERS, WHY, LATENCIES = "teacher-snapshots", "teacher-members", "why.json", "latency.jsonl"
TRAININGS, HITS, IMPORTED = "trainings.jsonl", "test_hits.jsonl", "imported.jsonl"
PICTURES = "pictures.json"
# The files of a student folder.
CARD, WEIGHTS, SOURCE, GRAPH = "student.json", "weights.safetensors", "student.py", "student.onnx"
INTEGERS, PROGRAM, XNNPACK = "student-int8.onnx", "student.pt2", "student.pte"
README, CONFIG, MODEL = "README.md", "config.json", "model.safetensors"
STUDENT_FILES = frozenset({CARD, WEIGHTS, SOURCE, GRAPH, INTEGERS, PROGRAM, XNNPACK, README, CONFIG, MODEL})
# The file of a comparison's folder, whose sub-folders are runs.
COMPARISON = "compare.json"
# The file of a folder of intermediate students: a digest of their settings.
BEGUN = "begun.json"

_OF_A_BEGINNING = (METRICS, LATENCIES, RESULTS)

JsonObject = dict[str, Any]
_ELSEWHERE = "Start again in another folder, or restore the file."
_ANEW = "Remove it; the next phase writes it anew."
_REMOVE_LINE = "Remove that line."


class _Search(TypedDict, total=False):
    settings: JsonObject
    state: str
    of: Count
    results: Index
    steps: Index


class _Record(TypedDict, total=False):
    """What is recorded of a finished phase; each has some of these."""

    accuracy: float
    balanced_accuracy: float
    interval: tuple[float, float]
    measures: dict[str, float]
    search_accuracy: float
    params: Index
    macs: Index | None
    seconds: Amount
    steps: Index | None
    evaluations: Index
    search: Count
    stopped: str
    saved: str
    retrain: JsonObject
    budget: dict[str, float]


class Input(TypedDict):
    """A file outside of the run, or a folder with weights."""

    path: str
    sha256: str


class _Manifest(TypedDict):
    job: JsonObject
    phases: dict[str, _Record]
    searches: NotRequired[list[_Search]]
    seed: NotRequired[Seed]
    data: NotRequired[dict[str, Any]]
    measure: NotRequired[str]
    inputs: NotRequired[list[Input]]
    lines: NotRequired[dict[str, Index]]
    insists: NotRequired[bool]


class _Row(TypedDict):
    """A row of the closing table."""

    name: str
    accuracy: NotRequired[float]
    balanced_accuracy: NotRequired[float]
    interval: NotRequired[tuple[float, float]]
    measures: NotRequired[dict[str, float]]
    params: NotRequired[Index]
    macs: NotRequired[Index | None]
    seconds: NotRequired[Amount]


class _Control(TypedDict, total=False):
    sentence: str


class _Results(TypedDict):
    rows: list[_Row]
    controls: dict[str, _Control]


class Metric(TypedDict):
    """What every line of `metrics.jsonl` has."""

    phase: str
    step: Index


@final
class OtherSettings(ValueError):
    """A folder holds a run that another job began.

    Attributes:
        differences: path in the job, value there and value here, of every setting that differs.
    """

    def __init__(self, folder: Path, differences: Sequence[tuple[str, Any, Any]]) -> None:
        self.differences = differences
        name, old, new = differences[0]
        more = f" ({len(differences)} settings differ)" if len(differences) > 1 else ""
        super().__init__(
            f"{folder} holds a run with other settings: {name} is {_words(old)} there and {_words(new)} here{more}. "
            "Use another --out, or the settings of that run to resume it."
        )


@final
class RunFolder:
    """A run folder: `run.json`, metrics, checkpoint, ranking, teacher, students, results, report.

    Args:
        folder: where it is.
        strict: raise on a missing or damaged file; otherwise leave it out and describe it in `problems`, as a report of
            an unfinished run needs it.
        builds: whether what the manifest names may be built, so that foreign names are refused.

    Raises:
        Untrusted: `strict` and `builds`, and the manifest names foreign code; see `kdnas.trust.admit`.
        ValueError: strict, and the folder is missing, holds something else, or its manifest is damaged.
    """

    def __init__(self, folder: Path, *, strict: bool = True, builds: bool = True) -> None:
        self.folder, self.strict = Path(folder), strict
        self.problems: list[str] = []
        self.renamed: dict[str, str] = {}
        self._read_stamp = self._stamp()
        if strict and not self.folder.is_dir():
            raise ValueError(f"there is no run {folder}. Make one with `kdnas run` or `kdnas train`.")
        if strict and not self.path(MANIFEST).is_file():
            raise ValueError(f"there is no run in {folder}: it has no {MANIFEST}. Give the folder of a run.")
        self.manifest = self.read(MANIFEST, _Manifest, _ELSEWHERE)
        self._named_again: dict[str, str] = {}
        opens = strict and builds
        self.manifest = located(self.manifest, self.folder, top_of(self.folder)) if opens else by_name(self.manifest)
        if opens:
            admit(self.manifest, self.path(MANIFEST))
            check_links(self.folder)

    @classmethod
    def create(cls, folder: Path, job: Mapping[str, Any], seed: int) -> "RunFolder":
        """The run in this folder: a new one, or the one that the same job began there.

        A run of another job that failed before anything was trained is replaced.

        Raises:
            OtherSettings: the folder holds a run with other settings.
            ValueError: the folder holds something else.
        """
        folder = Path(folder)
        remember(job)
        if folder.is_file():
            raise ValueError(f"{folder} is a file. Give --out a folder that is new, empty, or a run of the same job.")
        if not (folder / MANIFEST).exists():
            _drafts(folder)
        try:
            hold(folder, inside=True)
        except OSError as error:
            # Of a finished run nothing need be written; what is written all the same asks for the lock again.
            if error.errno not in (errno.EACCES, errno.EROFS) or not (folder / MANIFEST).exists():
                raise
        if (folder / MANIFEST).exists():
            run = cls(folder)
            differences, pairs = run.compare_job(job)
            if not differences:
                run.name_again(pairs)
                return run
            if not run.is_blank:
                raise OtherSettings(folder, differences)
            for path in (run.path(MANIFEST), *(run.path(name) for name in _OF_A_BEGINNING)):
                path.unlink(missing_ok=True)
        for draft in _drafts(folder):
            draft.unlink()
        top = _whole(folder)
        manifest = {
            "kdnas": version("kdnas"),
            "torch": version("torch"),
            "python": platform.python_version(),
            "commit": _commit(),
            "seed": seed,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "job": portable(job, folder, top),
            "phases": {},
            "searches": [],
            "inputs": [{"path": portable(path, folder, top), "sha256": d} for path, d in digests(job).items()],
        }
        write_json(folder / MANIFEST, manifest)
        return cls(folder)

    def compare_job(self, job: Mapping[str, Any]) -> tuple[list[tuple[str, Any, Any]], dict[str, str]]:
        """The differences between the run's job and another, and what lies elsewhere now.

        See `OtherSettings.differences` and `kdnas.runs.places.moved`.
        """
        new = printable_content(json.loads(json.dumps(job)))
        old, pairs = moved(self.manifest["job"], new)
        return list(_differences(old, new)), pairs

    def name_again(self, pairs: Mapping[str, str]) -> None:
        """Take data and files of the run from other places; data are compared when they are read, see `verify`.

        Args:
            pairs: by path in the job, or what stands for it, the new path.

        Raises:
            ValueError: a file or the weights in a folder are others than when the run began.
        """
        self.renamed |= pairs
        for old, path in pairs.items():
            digest = self._digest_of(old)
            if digest and weights_digest(path) != digest:
                raise ValueError(f"{path} has another content than the {by_name(old)!r} of the run {self.folder}.")
        name_again(pairs)
        settle({old: path for old, path in pairs.items() if self._digest_of(old)})
        self._named_again = {old: path for old, path in pairs.items() if not self._digest_of(old)}
        self.manifest = located(self.manifest, self.folder, top_of(self.folder))

    def _digest_of(self, path: str) -> str:
        return next((entry["sha256"] for entry in self.manifest.get("inputs", []) if entry["path"] == path), "")

    def report_inputs(self, source: Any) -> None:
        """Log a warning where files that a spec names, or weights in folders, have changed since the run began."""
        for path, digest in digests(source).items():
            if (before := self._digest_of(path)) and before != digest:
                _log.warning(f"{path} has changed since the run {self.folder} began, so what it trains now is another.")

    def verify(self, difference: str) -> None:
        """Remember the new place of data that were named again, unless they differ from those the run began with.

        Raises:
            ValueError: they differ; the message says how.
        """
        pairs, self._named_again = self._named_again, {}
        if pairs and difference:
            forget(pairs)
            raise ValueError(f"{next(iter(pairs.values()))} is not what {self.folder} began with: {difference}.")
        settle(pairs)

    @property
    def is_blank(self) -> bool:
        """Whether nothing was trained, searched or written but the first lines of a log."""
        names = {p.name for p in self.folder.iterdir() if not p.name.endswith(".draft") and not is_lock(p.name)}
        done = self.manifest["phases"] or self.manifest.get("searches")
        return not done and names <= {MANIFEST, *_OF_A_BEGINNING}

    def path(self, *names: str) -> Path:
        """A path inside the run.

        Raises:
            Damaged: a name, as a file of the run may hold it, leads out of it.
        """
        inner = PurePath(*names)
        if inner.is_absolute() or ".." in inner.parts or "\0" in str(inner):
            raise Damaged(self.folder, f"names {plain(str(inner), 80)!r}, which leads out of it", _ELSEWHERE)
        return self.folder / inner

    def own(self) -> None:
        """Lock the run for the rest of the command, as everything that writes into it does first.

        Raises:
            ValueError: another process writes there, or has written there since this one read the manifest.
        """
        if hold(self.folder) and self._stamp() != self._read_stamp:
            raise Busy(f"{self.folder} was written by another command meanwhile. Run the same command again.")

    def _stamp(self) -> tuple[int, ...]:
        path = self.path(MANIFEST)
        status = path.stat() if path.exists() else None
        return () if status is None else (status.st_ino, status.st_mtime_ns, status.st_size)

    def save(self) -> None:
        """Write the manifest with how many lines each JSON-lines file has, and remember the code that it names."""
        self._save({path.name: path.read_bytes().count(b"\n") for path in sorted(self.folder.glob("*.jsonl"))})

    def _save(self, lines: dict[str, int]) -> None:
        self.own()
        self.manifest["lines"] = lines
        remember(self.manifest)
        write_json(self.path(MANIFEST), portable(self.manifest, self.folder, top_of(self.folder)))

    def phase(self, name: str) -> dict[str, Any] | None:
        """The record of a finished phase, or None."""
        record = self.manifest["phases"].get(name)
        return None if record is None else Fields(record, self.path(MANIFEST), f"phases.{name}", _ELSEWHERE)

    def search(self, number: int) -> dict[str, Any]:
        """What is recorded of a search, by its 1-based number.

        Raises:
            Damaged: there is no such search, or a key is asked for that it lacks.
        """
        searches, path = self.manifest.get("searches", []), self.path(MANIFEST)
        if not 1 <= number <= len(searches):
            raise Damaged(path, f"has no search {number}", _ELSEWHERE)
        return Fields(searches[number - 1], path, f"searches.{number - 1}", _ELSEWHERE)

    def finish(self, name: str, **record: Any) -> None:
        """Record that a phase is done."""
        self.manifest["phases"][name] = record
        self.save()

    def require(self, phase: str, command: str) -> dict[str, Any]:
        """A finished phase's record.

        Raises:
            ValueError: it is not finished; the command that finishes it is named.
        """
        record = self.phase(phase)
        if record is None:
            raise ValueError(f"{self.folder} has no finished phase {phase!r} yet. Run: {command}")
        return record

    def metrics(self, phase: str, before: int | None = None) -> "Metrics":
        """Where to write a phase's metrics; lines of this phase at or after step `before` are taken out first."""
        self.own()
        metrics = self.lines(METRICS, Metric)
        lines = [m for m in metrics if m["phase"] != phase or (before is not None and m["step"] < before)]
        if len(lines) < (counts := self.manifest.get("lines", {})).get(METRICS, 0):
            self._save({**counts, METRICS: len(lines)})  # before they are gone: no kill makes them look lost
        _write_lines(self.path(METRICS), lines)
        return Metrics(self.path(METRICS), phase)

    def read(self, name: str, kind: Any = JsonObject, advice: str = "Remove it.") -> JsonObject:
        """The JSON object of a file; empty where there is none, or where it is damaged and the reader is not strict.

        Args:
            name: path inside the run.
            kind: the types that a strict reader requires; see `kdnas.runs.schema.mismatch`.
            advice: what to do about a damaged file.

        Raises:
            ValueError: strict, and the file is damaged or from a newer version.
        """
        path = self.path(name)
        if not self._is_there(path):
            return {}
        try:
            return read_json(path, kind if self.strict else JsonObject, advice)
        except (ValueError, OSError) as error:
            if self.strict:
                raise
            reason = error.reason if isinstance(error, Damaged) else plain(f"cannot be read ({error})")
            self.problems.append(f"{path.name} {reason}; it is left out.")
            return {}

    def _is_there(self, path: Path) -> bool:
        """Whether there is such a file; a reader that is not strict has not looked for links, and follows none out."""
        if not self.strict and leads_out(path, self.folder):
            self.problems.append(f"{path.name} is a link that leads out of the run; it is left out.")
            return False
        return path.exists()

    def lines(self, name: str, kind: Any = JsonObject) -> list[JsonObject]:
        """The objects of a JSON-lines file; a last line cut short by a kill is left out.

        Args:
            name: path inside the run.
            kind: the types that a strict reader requires of every line.

        Raises:
            ValueError: strict, and a line is damaged or from a newer version. Fewer lines than `run.json` knows of,
                which whoever removes a damaged one leaves, are reported.
        """
        path = self.path(name)
        if not self._is_there(path):
            self._report_lost(path, 0)
            return []
        objects: list[JsonObject] = []
        problems: list[Damaged] = []
        *texts, rest = read_bytes(path, "Remove it.").split(b"\n")
        for number, text in enumerate([*texts, rest], 1):
            place = f"{path}, line {number},"
            try:
                line = parse_json(text, place, _REMOVE_LINE, is_signed=True) if text.strip() else None
                if line is not None and (reason := mismatch(line, kind if self.strict else JsonObject)):
                    raise Damaged(place, reason, _REMOVE_LINE)
            except Damaged as error:
                if self.strict and (number <= len(texts) or not _is_torn(text)):
                    raise
                problems.append(error)
                continue
            if line is not None:
                if self.strict:
                    check_format(line.get("format", 0), place, _REMOVE_LINE)
                line.pop("format", None)
                objects.append(line)
        self._report_lost(path, len(texts))
        if problems and not self.strict:
            self.problems.append(
                f"{path.name}: {len(problems)} of {len(problems) + len(objects)} lines cannot be read and are left out."
            )
        return objects

    def _report_lost(self, path: Path, count: int) -> None:
        """Report a JSON-lines file that has fewer lines than when the manifest was written."""
        before = self.manifest.get("lines", {}).get(path.name, 0) if path.parent == self.folder else 0
        if count < before:
            text = f"{before - count} of {before} lines are missing."
            _log.warning(f"{path}: {text}") if self.strict else self.problems.append(f"{path.name}: {text}")

    def ranking(self, search: int | None = None) -> list[Entry]:
        """The scored architectures, of one search or of all.

        Raises:
            ValueError: a line is no entry.
        """
        entries = []
        for number, line in enumerate(self.lines(RANKING), 1):
            try:
                entries.append(Entry.from_json(line))
            except ValueError as error:
                raise Damaged(f"{self.path(RANKING)}, line {number},", str(error), _REMOVE_LINE) from error
        return [e for e in entries if search is None or e.search == search]

    def append(self, entries: Sequence[Entry]) -> None:
        """Add to the ranking."""
        self.add(RANKING, [e.to_json() for e in entries])

    def add(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add objects to a JSON-lines file, on disk when this returns."""
        self.own()
        path = self.path(name)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            _write_lines(path, self.lines(name))  # a kill cut the last line short
        append_lines(path, map(_line, rows))

    def results(self) -> JsonObject:
        """The rows of the closing table and the controls so far."""
        content = self.read(RESULTS, _Results, _ANEW)
        rows, controls = content.get("rows", []), content.get("controls", {})
        if self.strict:
            path = self.path(RESULTS)
            rows = [Fields(row, path, f"rows.{place}", _ANEW) for place, row in enumerate(rows)]
            controls = {name: Fields(control, path, f"controls.{name}", _ANEW) for name, control in controls.items()}
        return {"rows": rows, "controls": controls}

    def record_result(self, row: Mapping[str, Any]) -> None:
        """Add a row of the closing table, or replace the one of that name."""
        self.own()
        results = self.results()
        results["rows"] = [r for r in results["rows"] if r["name"] != row["name"]] + [dict(row)]
        write_json(self.path(RESULTS), results)

    def replace_results(self, rows: Sequence[Mapping[str, Any]], claims: Mapping[str, Mapping[str, Any]]) -> None:
        """The rows of the closing table in place of those so far, and controls that come before all others."""
        controls = {name: dict(control) for name, control in claims.items()}
        controls |= {name: c for name, c in self.results()["controls"].items() if name not in controls}
        write_json(self.path(RESULTS), self.results() | {"rows": [dict(row) for row in rows], "controls": controls})

    def forget_controls(self, which: Callable[[str], bool]) -> None:
        """Remove the controls whose names `which` accepts: those of an earlier search."""
        self.own()
        results = self.results()
        results["controls"] = {name: c for name, c in results["controls"].items() if not which(name)}
        write_json(self.path(RESULTS), results)

    def record_controls(self, controls: Mapping[str, Mapping[str, Any]]) -> None:
        """Add controls, by name: value, interval, sentence."""
        self.own()
        results = self.results()
        results["controls"] |= {name: dict(control) for name, control in controls.items()}
        write_json(self.path(RESULTS), results)


def run_around(folder: Path) -> RunFolder | None:
    """The run a student folder lies in, or None."""
    above = folder.resolve().parent
    if above.name == STUDENTS and (above.parent / MANIFEST).is_file():
        return RunFolder(above.parent)
    return None


def top_of(folder: Path) -> Path:
    """What is moved as a whole: the run that a folder is or lies in, or the comparison of runs; else the folder."""
    folder = folder.resolve()
    return _whole(next((run for run in (folder, *folder.parents[:2]) if (run / MANIFEST).is_file()), folder))


def _whole(run: Path) -> Path:
    above = run.resolve().parent
    return above if (above / COMPARISON).is_file() else run


def _drafts(folder: Path) -> list[Path]:
    """What a kill before the first manifest left in a folder.

    Raises:
        ValueError: it holds something else.
    """
    paths = [path for path in folder.iterdir() if not is_lock(path.name)] if folder.is_dir() else []
    drafts = [path for path in paths if path.match(f".{MANIFEST}.*.draft")]
    foreign = sorted(path.name for path in paths if path not in drafts)
    if foreign:
        raise ValueError(f"{folder} holds something else ({foreign[0]}). Give --out a new or an empty folder.")
    return drafts


@final
class Metrics:
    """Appends one phase's lines to `metrics.jsonl`."""

    def __init__(self, path: Path, phase: str) -> None:
        self._path, self._phase = path, phase

    def write(self, **record: Any) -> None:
        """One line."""
        append_lines(self._path, [_line({"phase": self._phase, **record})], sync=False)


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(f"{_line(line)}\n" for line in lines)
    write_atomically(path, lambda draft: write_text(draft, text))


def _is_torn(text: bytes) -> bool:
    """Whether what follows the last line end is the beginning of a line, as a kill leaves it, and not a whole one."""
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8", "replace"))
    except ValueError:
        return True
    except RecursionError:
        pass
    return False


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(signed(row))


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of every difference between two jobs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and "make" not in old and "make" not in new:
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        yield name or "job", old, new


def _words(value: Any) -> str:
    """A setting as people write it: a spec by its name and arguments, a list by its values."""
    if isinstance(value, Mapping):
        if "make" in value:
            path, arguments = str(value["make"]), value.get("arguments", {})
            options = [f"{key}={_words(option)}" for key, option in arguments.items()]
            return ",".join([path.partition(":")[0].rpartition(".")[2], *options])
        text = ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_words, value)) or "empty"
    elif isinstance(value, float):
        text = f"{value:.12g}"
    else:
        text = "none" if value is None or value == "" else str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _commit() -> str | None:
    """The commit of the checkout kdnas runs from, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
