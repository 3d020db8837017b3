"""A parser derived from functions: options from signatures, help from docstrings, defaults from both."""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from kdnas.plain import printable, show, silence
from kdnas.settings import Recipe
from kdnas.specs import Spec
from kdnas.values import hints_of, real, whole


class Parser(argparse.ArgumentParser):
    """Offers the nearest name for a misspelt option or command; errors end with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, whole)
        self.register("type", float, real)
        # A value such as -5s is one, to be refused by its meaning, and no unknown option.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse an option that was given twice: one of the two would be dropped without a word."""
        self._once: set[str] = set()
        return super().parse_known_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        is_single = isinstance(action, argparse._StoreAction | argparse.BooleanOptionalAction)
        if is_single and (arg_strings or action.option_strings):  # not a place that was left empty
            if action.dest in self._once:
                raise argparse.ArgumentError(action, "must be given once")
            self._once.add(action.dest)
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            show(message.rstrip("\n"), file)
        except BrokenPipeError:  # whoever reads the help has enough
            silence()

    def error(self, message: str) -> NoReturn:
        """End with the message and the nearest known name."""
        known = [option for action in self._actions for option in action.option_strings]
        words = [word.rstrip(":") for word in message.replace(",", " ").split() if word.startswith("--")]
        if "invalid choice" in message:
            words = [message.partition("invalid choice: '")[2].partition("'")[0]]
            known = message.partition("choose from ")[2].rstrip(")").replace("'", "").split(", ")
        near = [name for word in words for name in difflib.get_close_matches(word, known, n=1) if name != word]
        hint = f" Did you mean {near[-1]}?" if near else ""
        show(f"kdnas: {printable(message)}.{hint} See `{self.prog} --help`.", sys.stderr)
        raise SystemExit(2)


def add_command(commands: Any, name: str, function: Callable[..., Any], *, json: bool = False) -> Parser:
    """Add a sub-command that calls a function.

    Parameters without a default and those that are not keyword-only are positional arguments, which may be options of
    that name too where they have a default; `**recipe` adds the fields of `Recipe`; the type is read from the
    annotation, whose first name decides.

    Args:
        commands: what `add_subparsers` returned.
        name: of the command.
        function: with a docstring that documents every parameter under `Args:`.
        json: add the option --json.
    """
    summary, texts = documented(function)
    command: Parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    for parameter in inspect.signature(function).parameters.values():
        text = texts[parameter.name]
        if parameter.kind is parameter.VAR_KEYWORD:
            _add_recipe(command.add_argument_group("recipe", text), text)
        else:
            _add(command, parameter, hints_of(function).get(parameter.name), text)
    if json:
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.set_defaults(function=function)
    return command


def _converter(kind: Any) -> Callable[[str], Any]:
    """What makes a value of a typed text; a text where it may be one, such as a time with its unit."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    plain = [get_args(option)[0] if get_origin(option) is Annotated else option for option in kinds]
    return next((option for option in (str, int, float, Path) if option in plain), str)


def _add(to: Any, parameter: inspect.Parameter, kind: Any, text: str) -> None:
    annotation, default = str(parameter.annotation), parameter.default
    positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    options: dict[str, Any] = {"help": text}
    if default is not parameter.empty:
        options["default"] = default
        if "by default" not in text and default is not False and default not in (None, ()):
            options["help"] = f"{text} (default: {typed(default)})"
    if "Sequence[str" in annotation:
        options |= {"action": "append", "default": []}
    elif annotation.startswith("bool"):
        options["action"] = argparse.BooleanOptionalAction if default else "store_true"
    elif annotation.startswith("Literal"):
        options["choices"] = re.findall(r"['\"]([^'\"]+)['\"]", annotation)
    else:
        options["type"] = _converter(kind)
    if positional:
        options |= {"nargs": None if default is parameter.empty else "?"}
        options["metavar"] = None if "choices" in options else parameter.name.upper()
        if options.get("action") == "append":
            options |= {"action": None, "default": None, "nargs": "+"}
        known = {key: value for key, value in options.items() if value is not None}
        if default is parameter.empty:
            to.add_argument(parameter.name, **known)
            return
        # By its name too, as one remembers it from Python; the default is the option's.
        to.add_argument(parameter.name, **{**known, "default": argparse.SUPPRESS})
        plain = {key: value for key, value in known.items() if key not in ("nargs", "help", "default")}
        to.add_argument(f"--{parameter.name.replace('_', '-')}", **plain, default=default, help=argparse.SUPPRESS)
    else:
        options["required"] = default is parameter.empty
        if options.get("action") in (None, "append") and "choices" not in options:
            options["metavar"] = parameter.name.upper()
        to.add_argument(f"--{parameter.name.replace('_', '-')}", **options)


def _add_recipe(group: Any, text: str) -> None:
    """The fields of a recipe; their defaults are shown where the command has none of its own."""
    _, texts = documented(Recipe, "Attributes")
    own = re.findall(r"`(\w+)`", text)
    for field in dataclasses.fields(Recipe):
        help_ = texts[field.name]
        if (own or "by default" not in text) and field.name not in own:
            help_ += f" (default: {typed(field.default)})"
        options = get_args(field.type) if get_origin(field.type) is Literal else None
        kind = type(field.default)
        flag = f"--{field.name.replace('_', '-')}"
        group.add_argument(flag, type=kind, choices=options, metavar=None if options else kind.__name__, help=help_)


def documented(function: Callable[..., Any], section: str = "Args") -> tuple[str, dict[str, str]]:
    """A docstring's first line, and the text of every entry of a section."""
    text = inspect.getdoc(function) or ""
    body = text.partition(f"\n{section}:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    \**(\w+): (.*(?:\n {8}.*)*)", body, re.MULTILINE)
    texts = {name: " ".join(entry.split()).rstrip(".").replace("%", "%%") for name, entry in entries}
    return text.partition("\n")[0].rstrip("."), texts


def typed(value: Any) -> str:
    """A default as a person would type it."""
    if isinstance(value, Spec):
        options = [f"{name}={typed(option)}" for name, option in value.arguments]
        return ",".join([value.name, *options])
    if isinstance(value, tuple):
        return "+".join(map(typed, value))
    return "no limit" if value == 1e9 else str(value)
