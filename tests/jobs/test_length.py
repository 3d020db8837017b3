"""Jobs are read from top to bottom: no function's body is longer than a screen."""

import ast
from pathlib import Path

import kdnas.jobs

LIMIT = 60


def bodies(text: str) -> dict[str, int]:
    """Lines of each function's body, without its signature and docstring, by name."""
    lengths = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lengths[node.name] = node.end_lineno - body[0].lineno + 1 if body else 0
    return lengths


def test_a_body_is_counted_without_signature_and_docstring():
    text = 'def short(\n    a,\n):\n    """Two\n\n    lines.\n    """\n    b = a\n    return b\n'
    assert bodies(text) == {"short": 2}


def test_no_function_of_a_job_is_longer_than_a_screen():
    for path in sorted(Path(kdnas.jobs.__file__).parent.glob("*.py")):
        for name, length in bodies(path.read_text(encoding="utf-8")).items():
            assert length <= LIMIT, f"{path.name}: {name} has {length} lines"
