"""Counts identifiers that say nothing about their value: bare participles and `one`.

Usage: `python .ci/words.py [FOLDER] [--limit PER_THOUSAND]`. The share is taken of all names and arguments (`ast.Name`
and `ast.arg`) of the Python files below FOLDER, `kdnas` by default; outer underscores are ignored. Prints the share,
the words and the files with the most, and exits with 1 above the limit.
"""

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

WORDS = frozenset("found held made given shown said asked kept taken drawn taught named told seen one".split())
LIMIT = 5.0


def identifiers(path: Path) -> list[str]:
    """The names and arguments of a file, as often as they occur, without outer underscores."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    names = [n.id if isinstance(n, ast.Name) else n.arg for n in nodes if isinstance(n, ast.Name | ast.arg)]
    return [name.strip("_") for name in names]


def main(arguments: list[str] | None = None) -> int:
    """Print the counts; return the exit code."""
    parser = argparse.ArgumentParser(description="Share of identifiers that are bare participles or `one`.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("kdnas"), help="folder to count (default: kdnas)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="highest share, per thousand (default: %(default)s)")
    options = parser.parse_args(arguments)
    total, words, files = 0, Counter[str](), Counter[str]()
    for path in sorted(options.folder.rglob("*.py")):
        names = identifiers(path)
        hits = [name for name in names if name in WORDS]
        total += len(names)
        words.update(hits)
        files[str(path)] = len(hits)
    if not total:
        print(f"{options.folder} has no Python file with a name in it.")
        return 1
    share = 1000 * words.total() / total
    print(f"{words.total()} of {total} identifiers are bare participles or `one`.")
    print(f"That is {share:.1f} per thousand, limit {options.limit:g}:")
    print(", ".join(f"{word} {count}" for word, count in words.most_common()))
    for path, count in files.most_common(10):
        if count:
            print(f"{count:6d} {path}")
    return int(share > options.limit)


if __name__ == "__main__":
    sys.exit(main())
