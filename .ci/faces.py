"""Writes what the packages with a lazy face offer, as `__init__.pyi` for type checkers and editors.

Usage: `python .ci/faces.py [--check]`. Every package below `kdnas` whose `__init__.py` calls `kdnas.specs.face` gets
one. With `--check` nothing is written, and the exit code is 1 when a file is missing or out of date.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 120


def offers(package: str, text: str) -> dict[str, str] | None:
    """Name to module, read from the call of `face` in the package's `__init__.py`; None when there is no call."""
    from kdnas.specs import algorithms

    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    call = next((call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "face"), None)
    if call is None:
        return None
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    paths = algorithms(package).values() if options.get("with_algorithms") else ()
    classes = {name: module for module, _, name in (path.partition(":") for path in paths)}
    return classes | ast.literal_eval(call.args[1])


def stub(package: str, names: dict[str, str], text: str) -> str:
    """The text of `__init__.pyi`: one import per name, sorted as ruff sorts them."""
    lines = ["# Written by .ci/faces.py (`make format`).", ""]
    origins = {name: package if module == f"{package}.{name}" else module for name, module in names.items()}
    for name, origin in sorted(origins.items(), key=lambda pair: (pair[1], pair[0].islower(), pair[0].lower())):
        line = f"from {origin} import {name} as {name}"
        lines.append(line if len(line) <= WIDTH else f"from {origin} import (\n    {name} as {name},\n)")
    if "__version__" in text:
        lines += ["", "__version__: str"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the files; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the __init__.pyi of every package with a lazy face.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is out of date")
    options = parser.parse_args(arguments)
    outdated = 0
    for path in sorted((root / "kdnas").rglob("__init__.py")):
        text = path.read_text(encoding="utf-8")
        package = ".".join(path.parent.relative_to(root).parts)
        names = offers(package, text)
        target = path.with_suffix(".pyi")
        if names is None or (target.is_file() and target.read_text(encoding="utf-8") == stub(package, names, text)):
            continue
        if options.check:
            print(f"{target.relative_to(root)} is out of date. Run `make format`.")
            outdated = 1
        else:
            target.write_text(stub(package, names, text), encoding="utf-8")
            print(f"wrote {target.relative_to(root)}")
    return outdated


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
