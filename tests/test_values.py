"""Numbers that are none are refused by one rule, wherever a number is taken: walked, not listed."""

import copy
import dataclasses
import functools
import inspect
import json
import math
import tomllib
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdnas import settings, trust
from kdnas.cli import commands
from kdnas.cli.commands import COMMANDS, main, parser, sub_parsers
from kdnas.costs.budget import Budget
from kdnas.data.load import LOADERS
from kdnas.preprocessing import Preprocessing
from kdnas.settings import Experiment
from kdnas.space import SearchSpace
from kdnas.specs import Spec, algorithms, resolve, spec
from kdnas.tables import load_space, space_from_table
from kdnas.values import Count, Range, Real, Share, Sizes, check_fields, check_value, hints_of, problem

NONE = (math.nan, math.inf, -math.inf, 10**400, True)
ROOT = Path(__file__).parents[1]


def numeric(kind: Any) -> Any:
    """The int or float within an annotation, or None."""
    if get_origin(kind) is Annotated:
        return numeric(get_args(kind)[0])
    options = (kind,) if not get_args(kind) or get_origin(kind) in (tuple, Literal) else get_args(kind)
    return next((n for option in options for n in (int, float) if option is n or _of(option) is n), None)


def _of(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else None


def refused(make, name, value):
    with pytest.raises(ValueError) as error:
        make()
    message = str(error.value)
    assert name in message and len(message) < 500, (name, value, message)


@functools.cache
def once():
    return parser()


def numbers_of_commands():
    for name, command in COMMANDS.items():
        for action in sub_parsers(once())[name]._actions:
            kind = hints_of(command.function).get(action.dest) or hints_of(settings.Recipe).get(action.dest)
            if numeric(kind) or action.type in (int, float):
                yield name, action, numeric(kind)


def needed(name):
    """A command with something for everything that it requires."""
    arguments = [name]
    for action in sub_parsers(once())[name]._actions:
        if action.required or (not action.option_strings and action.nargs is None and action.dest != "help"):
            value = next(iter(action.choices)) if action.choices else "nowhere"
            arguments += [action.option_strings[0], value] if action.option_strings else [value]
    return arguments


def test_every_number_of_every_command_is_one(capsys, monkeypatch):
    walked = list(numbers_of_commands())
    monkeypatch.setattr(commands, "parser", once)  # it is the same for all of the command lines
    assert len(walked) > 60 and {name for name, _, _ in walked} >= {"run", "search", "quantize", "export", "compare"}
    for name, action, kind in walked:
        for text in ("nan", "inf", "-inf", "-1", "1e400", "true", "1_000", "１２", "9" * 5000):
            if kind is int and text == "9" * 5000:
                continue  # a long one is refused in the same place
            with pytest.raises(SystemExit) as stopped:
                main([*needed(name), action.option_strings[0], text])
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and "Traceback" not in error, (name, action.dest, text)
            last = error.splitlines()[-1]
            assert action.option_strings[0] in last, (name, action.dest, text, last)


def test_every_number_of_every_command_is_one_in_python_too():
    for name, action, _ in numbers_of_commands():
        function = COMMANDS[name].function
        empty = inspect.Parameter.empty
        required = {p.name: "nowhere" for p in inspect.signature(function).parameters.values() if p.default is empty}
        required.pop("recipe", None)
        for value in (*NONE, -1) if action.dest != "top" else ():
            refused(partial(function, **{**required, action.dest: value}), action.dest, value)


def instance(kind):
    """An object of a settings class, with something for every field that has no default."""
    makers = {Spec: lambda: spec("kdnas.data:digits"), SearchSpace: lambda: load_space("toy"), Budget: Budget}
    values = {}
    for field in dataclasses.fields(kind):
        hint = hints_of(kind)[field.name]
        if field.default is field.default_factory is dataclasses.MISSING:
            values[field.name] = makers[hint]() if hint in makers else instance(hint)
    return kind(**values)


SETTINGS = [
    kind
    for kind in vars(settings).values()
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind) and kind.__module__ == "kdnas.settings"
]


def test_every_number_of_every_settings_class_is_one():
    count = 0
    for kind in SETTINGS:
        whole = instance(kind)
        for field in dataclasses.fields(kind):
            if numeric(hints_of(kind)[field.name]) and hints_of(kind)[field.name] is not bool:
                count += 1
                for value in (*NONE, -1, "1", (1,)):
                    refused(partial(dataclasses.replace, whole, **{field.name: value}), field.name, value)
    assert count > 30


OF_ARRAYS = (np.float64("nan"), np.float32(2.5), np.int64(3), np.bool_(True), np.array([1]), b"3", 1j, "many", [3])


@pytest.mark.parametrize("value", [*NONE, -1, *OF_ARRAYS], ids=repr)
def test_numbers_of_other_libraries_and_what_is_no_number_are_refused_in_python(tmp_path, value):
    for name in ("macs", "params", "memory", "size", "latency"):
        refused(lambda name=name: Budget(**{name: value}), name, value)
    for name in ("steps", "learning_rate", "seed"):
        refused(lambda name=name: settings.Recipe(**{name: value}), name, value)
        arguments = {"data": "digits", "space": "toy", "out": tmp_path / "out", name: value}
        refused(lambda arguments=arguments: COMMANDS["run"].function(**arguments), name, value)
    assert not (tmp_path / "out").exists()


def numbers(value, *path):
    """The path of every number in plain content."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from numbers(entry, *path, key)


def replaced(content, path, value):
    changed = copy.deepcopy(content)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("command", "option", "text"),
    [
        ("run", "--scorer", "rdm,premature={}"),
        ("run", "--searcher", "nsga2,rate={}"),
        ("run", "--data", "folder:x,seed={}"),
        ("run", "--teacher", "timm:resnet18,size={}"),
        ("run", "--loss", "soft_targets={}"),
        ("run", "--budget", "macs={}"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "-1", "1_0", "１２"])
def test_a_number_within_an_option_is_one(capsys, tmp_path, command, option, text, value):
    given = {"--data": "digits", "--space": "toy", option: text.format(value), "--out": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stopped:
        main([command, *(word for pair in given.items() for word in pair)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "Traceback" not in error and len(error) < 500
    assert value in error or "whole number" in error, error
    assert not (tmp_path / "out").exists()


def test_every_number_of_a_run_json_is_one():
    job = json.loads((ROOT / "tests" / "golden" / "run" / "run.json").read_text())["job"]
    Experiment.from_json(job)
    # Arguments are checked when they are used; some of what version 0.1 held is not read any more.
    unread = lambda key: key in ("arguments", "num_random") or str(key).startswith("teacher_")  # noqa: E731
    walked = [path for path in numbers(job) if not any(map(unread, path)) or path[-1] == "teacher_views"]
    assert len(walked) > 25
    for path in walked:
        for value in (*NONE, -1, "one"):
            with pytest.raises(ValueError) as error:
                Experiment.from_json(replaced(job, path, value))
            assert len(str(error.value)) < 500, (path, value)


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.toml")), ids=lambda path: path.stem)
def test_every_number_of_every_table_is_one(path):
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    # One entry of each list of equal parts: all of them have the same fields.
    for where in [w for w in numbers(content) if not any(isinstance(key, int) and key > 0 for key in w)]:
        for value in (*NONE, -1):
            with pytest.raises(ValueError) as error:
                space_from_table(replaced(content, where, value))
            assert len(str(error.value)) < 500, (where, value)


EXAMPLES = {str: "nowhere", int: 3, Preprocessing: Preprocessing(height=8, width=8, mean=(0.5,), std=(0.25,))}
KINDS = ("losses", "scorers", "searchers", "distillers")
MAKERS = [f"{module}:{name}" for module, names in trust._MAKERS.items() for name in names if name not in LOADERS]
MAKERS += [f"{loader.__module__}:{name}" for name, (loader, _) in LOADERS.items()]


def test_every_number_of_every_algorithm_and_every_maker_is_one():
    count = 0
    for paths in (*(algorithms(f"kdnas.{kind}").values() for kind in KINDS), MAKERS):
        for path in paths:
            for name, hint in hints_of(resolve(path)).items():
                option = inspect.signature(resolve(path)).parameters.get(name)
                if numeric(hint) and option is not None and (path not in MAKERS or option.default is not option.empty):
                    count += 1
                    values = NONE if get_origin(hint) is not tuple else NONE[:-1]
                    for value in (*values, *(() if hint is Real else (-1,))):
                        parameters = inspect.signature(resolve(path)).parameters.values()
                        others = [p for p in parameters if p.default is p.empty and p.name != name]
                        more = {p.name: EXAMPLES.get(hints_of(resolve(path)).get(p.name), object()) for p in others}
                        refused(partial(spec(path, **{name: value}).build, **more), name, value)
    assert count > 80


@given(st.floats() | st.integers() | st.booleans() | st.text(max_size=3) | st.none())
def test_what_is_admitted_is_a_number_within_its_range(value):
    for kind, holds in (
        (Count, lambda v: type(v) is int and 1 <= v <= 2**40),
        (Share, lambda v: type(v) in (int, float) and 0 <= v <= 1),
        (float | None, lambda v: v is None or (type(v) in (int, float) and abs(v) < 2e308 and math.isfinite(v))),
        (Literal[1, "a"], lambda v: v in (1, "a") and type(v) is not bool and type(v) is not float),
    ):
        assert (not problem(value, kind)) == holds(value), kind


def test_the_message_says_what_the_value_must_be():
    for value, kind, message in (
        (2.5, Count, "`x` must be a whole number, got 2.5."),
        (0, Count | None, "`x` must be at least 1, got 0."),
        ("a", Count | None, "`x` must be a whole number, got 'a'."),
        ((1, "a"), Sizes, "`x` must be a whole number, got 'a' in [1, 'a']."),
        ((1, 2, 3), tuple[int, int], "`x` must have 2 entries, got [1, 2, 3]."),
        (3, tuple[int, ...], "`x` must be a list, got 3."),
        ("c", Literal["a", "b"], "`x` must be one of a, b, got 'c'."),
        ("\x1b" * 99, int, None),
    ):
        with pytest.raises(ValueError) as error:
            check_value("x", value, kind)
        assert message is None or str(error.value) == message
        assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_types_that_check_themselves_are_left_alone():
    check_value("x", object(), Spec)
    check_value("x", "text", Path)
    check_value("x", [1], Any)
    check_fields(Preprocessing(height=8, width=8, mean=(0.5,), std=(1.0,)))
    with pytest.raises(ValueError, match="`std` must be finite"):
        Preprocessing(height=8, width=8, mean=(0.5,), std=(math.nan,))
    assert Range().problem(10**400)
