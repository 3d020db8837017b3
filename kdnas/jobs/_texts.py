"""What a command prints: first lines, tables and JSON objects, from its options and its result.

Nothing here imports torch before a result is there.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdnas.runs.folder import CARD
from kdnas.specs import resolve

Values = dict[str, Any]
"""A command's options, by name."""


def into(name: str) -> Callable[[Values], str]:
    """The first line of a command that writes `--out`, from an experiment or the option `name`."""
    return lambda values: f"{values.get('experiment') or values.get(name) or 'nothing yet'} into {values['out']}"


def beside(values: Values, name: str, ending: str) -> str:
    """`--out`, or the path of the option `name` with an ending, which is its default."""
    return str(values["out"] or values[name] + ending)


def lines(result: Values, _: Values) -> str:
    """A name and a value per line, those of a table within indented; `accuracy` has the name of the task's measure."""
    measure = str(result.get("measure", "accuracy"))
    shown = {name.replace("accuracy", measure): value for name, value in result.items() if name != "measure"}
    return "\n".join(_rows(shown))


def _rows(values: Values) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from (name, *(f"  {row}" for row in _rows(value)))
        else:
            yield f"{name:<16} {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


def exporting(values: Values) -> str:
    """The first line of `kdnas export`: a place of a run, or a student folder."""
    folder = values["run"]
    return folder if (Path(folder) / CARD).is_file() else f"place {values['place']} of {folder}"


def exported(result: Values, values: Values) -> str:
    """The same, with the forms of the student below."""
    from kdnas.students.forms import forms_table

    above = {name: value for name, value in result.items() if name not in ("forms", "checks")}
    return "\n".join([lines(above, values), "", forms_table(result["forms"])]).rstrip()


def table(path: str) -> Callable[[Any, Values], str]:
    """What the function at an import path makes of the result."""
    return lambda result, _: resolve(path)(result)


def closing(_: Any, values: Values) -> str:
    """The closing table of the run in `--out`."""
    from kdnas.jobs._run import closing_table
    from kdnas.runs.folder import RunFolder

    return closing_table(RunFolder(Path(values.get("out") or values["run"])))


def training(run: Any, _: Values) -> str:
    """The record of a finished training."""
    return json.dumps(run.storage.phase("train"))


def search_text(result: Any, values: Values) -> str:
    """The best places of a ranking, or its Pareto front, and what the search's controls say."""
    from kdnas.jobs.search import closing_lines
    from kdnas.runs.folder import RunFolder

    return "\n".join([str(_places(result, values)), "", *closing_lines(RunFolder(Path(values["run"])))])


def search_json(result: Any, values: Values) -> Values:
    """The same as `search_text`, with the search's record."""
    from kdnas.runs.folder import RunFolder

    storage = RunFolder(Path(values["run"]))
    controls = storage.results()["controls"]
    return {"places": _places(result, values).to_json(), "controls": controls, "search": storage.phase("search")}


def unchanged(result: Any, _: Values) -> Any:
    """A result that is a JSON object already."""
    return result


def _places(result: Any, values: Values) -> Any:
    return result.front() if values["front"] else result[: values["top"]]
