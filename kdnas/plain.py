"""Text from files and values as a terminal may show it."""

import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

BROKEN_PIPE = 128 + 13
"""The exit code, as a shell says it of a program that SIGPIPE ended."""
_LONG_WORD = re.compile(r"\S{300,}")
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with escapes such as `\x1b` in place of what a terminal would obey instead of showing it.

    These are control characters, line ends, marks that turn the direction of writing, and halves of characters, which
    no output encoding has.

    Args:
        text: any text.
        lines: leave line feeds and tabs as they are.

    Example:
        >>> print(printable("cat\x1b[2J\n"))
        cat\x1b[2J\n
    """
    kept_apart = "\n\t" if lines else ""
    return _OBEYED.sub(lambda m: m[0] if m[0] in kept_apart else m[0].encode("unicode_escape").decode(), text)


def printable_content(value: Any) -> Any:
    """Plain JSON or TOML content with `printable` texts and keys."""
    if isinstance(value, dict):
        return {printable(name): printable_content(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [printable_content(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def of_short_words(text: str) -> str:
    """The text with the middle of each word of 300 characters or more left out: a path may be as long as the file."""
    return _LONG_WORD.sub(lambda match: f"{match[0][:120]}…{match[0][-120:]}", text)


def typed_path(text: str) -> Path:
    """The path that a person typed, or that a list of files holds; where no user is called as after `~`, it is a name.

    Example:
        >>> typed_path("~no such user/a.png").name
        'a.png'
    """
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises a RuntimeError


def reason(error: BaseException, *, named: bool = False) -> str:
    """The first line of a library's error for a message, printable and of 200 characters at most.

    Args:
        error: of other people's code.
        named: put the name of its class in front, which also stands for an error without words.

    Example:
        >>> reason(KeyError("weight"), named=True)
        "KeyError: 'weight'"
    """
    line, name = printable(str(error).strip().partition("\n")[0])[:200].rstrip("."), type(error).__name__
    return f"{name}: {line}" if named and line else line or name


def show(text: object, stream: TextIO | None = None) -> None:
    """Print a text; everything that kdnas prints goes through here.

    Control characters, and those that the stream's encoding does not have, are printed as escapes.

    Args:
        text: one or several lines.
        stream: where to; by default the standard output of now.
    """
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = printable(str(text), lines=True).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)


def silence() -> None:
    """Send what is printed nowhere where nobody reads it any more: the interpreter flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


def show_everything() -> None:
    """Let warnings of libraries and tracebacks go through `show` too, for a program that is a command line."""

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        show(f"warning: {message}", sys.stderr)

    def end(_: Any, error: BaseException, __: Any) -> None:
        show("".join(traceback.format_exception(error)).rstrip(), sys.stderr)

    warnings.showwarning = warn  # type: ignore[assignment]
    sys.excepthook = end
