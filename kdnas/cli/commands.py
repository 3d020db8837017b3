"""The command line: a table of commands, each a function; torch is imported when one runs."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from kdnas.cli.parser import Parser, add_command
from kdnas.jobs import _texts as texts
from kdnas.jobs import commands as jobs
from kdnas.jobs._signals import ending, stopping
from kdnas.jobs._texts import Values
from kdnas.plain import BROKEN_PIPE, of_short_words, printable, show, show_everything, silence
from kdnas.ranks.team import joined
from kdnas.specs import look_in_working_folder
from kdnas.values import Count, check_value


class Command(NamedTuple):
    """One command of the command line.

    Attributes:
        function: what it calls.
        title: what is printed first, from the options.
        text: what is printed of the result, from the result and the options.
        following: the command to run next, from the result and the options.
        json: the result as a JSON object, with `--json`; None where there is no such option.
        is_well: whether the exit code is 0; 1 otherwise.
    """

    function: Callable[..., Any]
    title: Callable[[Values], str] | None
    text: Callable[[Any, Values], str] = lambda result, _: str(result)
    following: Callable[[Any, Values], str] | None = None
    json: Callable[[Any, Values], Any] | None = None
    is_well: Callable[[Any], bool] = lambda result: result is not False


COMMANDS = {
    "demo": Command(jobs.demo, lambda v: f"scikit-learn's digits into {v['out']} (two to four minutes)"),
    "run": Command(jobs.run, texts.into("data")),
    "doctor": Command(
        jobs.doctor,
        lambda v: f"{v['experiment'] or v['data'] or 'the installation'}",
        texts.table("kdnas.jobs.doctor:text_of"),
        json=lambda result, _: [finding._asdict() for finding in result],
        is_well=lambda result: all(finding.kind != "fault" for finding in result),
    ),
    "plan": Command(
        jobs.plan,
        lambda v: f"{v['experiment'] or v['data'] or 'nothing yet'}",
        texts.table("kdnas.jobs.plan:text_of"),
        json=lambda result, _: result.to_json(),
    ),
    "fit": Command(
        jobs.fit,
        texts.into("data"),
        texts.lines,
        lambda _, v: f"kdnas run --data {v['data']} --teacher {v['out']} --space SPACE --out RUN",
        texts.unchanged,
    ),
    "train": Command(jobs.train, texts.into("experiment"), texts.training, lambda _, v: f"kdnas search {v['out']}"),
    "search": Command(
        jobs.search, lambda v: v["run"], texts.search_text, lambda _, v: f"kdnas finals {v['run']}", texts.search_json
    ),
    "finals": Command(
        jobs.finals, lambda v: v["run"], texts.closing, lambda _, v: f"kdnas report {v['run']}", texts.unchanged
    ),
    "rank-check": Command(
        jobs.rank_check,
        lambda v: f"{v['run']} against {v['table']}",
        texts.table("kdnas.jobs.rank_check:rank_check_table"),
        json=texts.unchanged,
    ),
    "why": Command(
        jobs.why,
        lambda v: f"{v['architecture']} of {v['run']}",
        texts.table("kdnas.jobs.why:why_table"),
        lambda _, v: f"kdnas report {v['run']}",
        texts.unchanged,
    ),
    "convert": Command(
        jobs.convert,
        texts.into("source"),
        following=lambda _, v: (
            f"kdnas run --space {v['out']}/space.toml --weights {v['out']}/supernet.safetensors --data DATA --out RUN"
        ),
    ),
    "export": Command(
        jobs.export,
        texts.exporting,
        texts.exported,
        lambda result, _: f"kdnas retrain {result['student']}" if "place" in result else "",
        texts.unchanged,
    ),
    "push": Command(jobs.push, lambda v: f"{v['student']} to {v['repo']}"),
    "latency": Command(jobs.latency, lambda v: f"{v['space']} on {v['target']}", texts.lines, json=texts.unchanged),
    "retrain": Command(
        jobs.retrain,
        lambda v: f"{v['student']} into {texts.beside(v, 'student', '-retrained')}",
        texts.lines,
        lambda _, v: jobs.report_command(v["student"]),
        texts.unchanged,
    ),
    "prune": Command(jobs.prune, texts.into("data"), texts.closing, json=texts.unchanged),
    "quantize": Command(
        jobs.quantize,
        lambda v: f"{v['student']} into {texts.beside(v, 'student', '-int8.onnx')}",
        texts.lines,
        json=texts.unchanged,
    ),
    "compare": Command(
        jobs.compare,
        lambda v: f"{v['systems']} systems on {v['data']} into {v['out']}",
        texts.table("kdnas.jobs.compare:comparison_table"),
        lambda _, v: f"open {v['out']}/report.html",
        texts.unchanged,
    ),
    "grow": Command(
        jobs.grow,
        texts.into("data"),
        texts.closing,
        lambda result, _: f"kdnas retrain {result['student']} --teacher none --weights inherited",
        texts.unchanged,
    ),
    "report": Command(jobs.report, lambda v: ", ".join(v["run"])),
    "track": Command(jobs.track, lambda v: f"{v['run']} to {v['to']}", texts.lines, json=texts.unchanged),
    "list": Command(jobs.listed, None),
    "losses": Command(jobs.check_losses, None),
    "taps": Command(jobs.taps, lambda v: f"{v['teacher']} beside {v['space']}, on images as of {v['data']}"),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="kdnas", description="Find the student architecture that learns best from your teacher.")
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        added = add_command(commands, name, command.function, json=command.json is not None)
        if name == "search":
            added.add_argument("--top", type=int, default=10, help="number of places to print (default: 10)")
            added.add_argument("--front", action="store_true", help="print the Pareto front of score and costs instead")
    return top


def _as_typed(message: str, command: argparse.ArgumentParser) -> str:
    """The message with the options' spelling in place of the parameters' names."""
    known = {action.dest: action.option_strings[0] for action in command._actions if action.option_strings}
    return re.sub(r"`(\w+)`", lambda match: f"`{known.get(match[1], match[1])}`", message)


def sub_parsers(of: argparse.ArgumentParser) -> dict[str, Parser]:
    """The commands' own parsers, by name."""
    return next(action.choices for action in of._actions if isinstance(action, argparse._SubParsersAction))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user ends with a message and exit code 2, never with a traceback."""
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    own = top if options.command is None else sub_parsers(top)[options.command]
    if unknown:
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.version:
        show(version("kdnas"))
        return
    if options.command is None:
        top.print_help()
        return
    values = {name: value for name, value in vars(options).items() if name not in ("command", "version", "function")}
    for name, value in values.items():
        if value == "" or (isinstance(value, list) and "" in value):
            own.error(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
    show_everything()
    look_in_working_folder()
    try:
        with stopping(), joined() as is_first:
            if is_first:
                _execute(options.command, values)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has enough
        silence()
    except (ValueError, FloatingPointError) as error:
        _end(options.command, _as_typed(str(error), own), 2)
    except (MemoryError, RuntimeError, OSError, KeyboardInterrupt) as error:
        if (end := ending(error)) is None:
            raise
        _end(options.command, *end)


def _execute(name: str, values: Values) -> None:
    command = COMMANDS[name]
    if command.title is not None:
        show(f"kdnas {name}: {printable(command.title(values))}", sys.stderr)
    display = {key: values.get(key) for key in ("json", "top", "front")}
    check_value("top", display["top"], Count | None)
    try:
        result = command.function(**{key: value for key, value in values.items() if key not in display})
    except BrokenPipeError:  # nobody reads its progress any more, and its work is not done
        silence()
        raise SystemExit(BROKEN_PIPE) from None
    if display["json"] and command.json is not None:
        show(json.dumps(command.json(result, values)))
    elif not isinstance(result, bool):
        show(command.text(result, values))
    if not command.is_well(result):
        raise SystemExit(1)
    if command.following is not None and (following := command.following(result, values)):
        show(f"next: {printable(following)}", sys.stderr)


def _end(command: str, message: str, code: int) -> None:
    show(f"kdnas {command}: {of_short_words(printable(message))}", sys.stderr)
    raise SystemExit(code) from None
