"""What there is, one line each, from the code and the tables themselves."""

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path

from kdnas.specs import algorithms, resolve
from kdnas.tables import load_space, shared_folder


def listing(what: str) -> str:
    """The lines of `kdnas list WHAT`.

    Args:
        what: spaces, losses, distillers, scorers, searchers, data, experiments or systems.
    """
    if what == "spaces":
        return _lines(_space(path) for path in sorted(shared_folder("search_spaces").glob("*.toml")))
    if what == "experiments":
        return _lines(
            (path.stem, (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0])
            for path in sorted(shared_folder("experiments").glob("*.py"))
        )
    if what == "systems":
        from kdnas.settings import systems

        return _lines(systems().items())
    if what == "data":
        from kdnas.data.load import FORMS, LOADERS

        rows = [(form, _first(loader)) for form, (loader, _) in zip(FORMS, LOADERS.values(), strict=True)]
        return _lines([*rows, ("package.module:function", "A function of yours that returns a Data.")])
    if what == "losses":
        from kdnas.losses.check import describe

        return _lines((d.name, f"{d.kind}; needs {d.needs}; {d.summary} [{d.source}]") for d in describe())
    return _lines((name, _first(resolve(path))) for name, path in sorted(algorithms(f"kdnas.{what}").items()))


def _space(path: Path) -> tuple[str, str]:
    space = load_space(path)
    count = space.count()
    return (
        path.stem,
        f"{count:,} architectures; {space.source}" if count < 1e6 else f"{count:.2e} architectures; {space.source}",
    )


def _first(of: object) -> str:
    return (inspect.getdoc(of) or "").partition("\n")[0]


def _lines(rows: Iterable[tuple[str, str]]) -> str:
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in listed)
