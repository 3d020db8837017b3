"""The names that the source text of a module binds and uses."""

import ast
import importlib
import inspect
import symtable
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, final


@final
class ModuleText:
    """A module's text, and which of its top-level statements bind a name.

    Attributes:
        live: the imported module.
        package: that relative imports start from.
        statements: by name, the top-level statements that bind or change it.
        future: whether it imports from `__future__`.

    Raises:
        ValueError: the module has no source text.
    """

    def __init__(self, name: str) -> None:
        self.live = importlib.import_module(name)
        self.package = self.live.__package__ or ""
        try:
            source = inspect.getsource(self.live)
        except (OSError, TypeError) as error:
            raise ValueError(
                f"the code of {name} cannot be read ({error}). Put the layers into a Python file."
            ) from error
        self._lines = source.splitlines()
        self.statements: dict[str, list[ast.stmt]] = {}
        self.future = False
        for statement in _top_level(ast.parse(source)):
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                self.future = True
                continue
            for bound in bound_names(statement):
                self.statements.setdefault(bound, []).append(statement)

    def text(self, statement: ast.stmt) -> str:
        """The statement as it stands, with its decorators and the comment above it."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while first > 1 and self._lines[first - 2].startswith("#"):
            first -= 1
        return textwrap.dedent("\n".join(self._lines[first - 1 : statement.end_lineno]))


def importable(module: str) -> bool:
    """Whether a file that stands alone may import it: torch or the standard library."""
    root = module.partition(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


def leftwards(node: ast.expr) -> Iterator[ast.expr]:
    """The expression and the operands of its attribute access, indexing and starring, down to its root."""
    yield node
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
        yield node


def _top_level(module: ast.Module) -> Iterator[ast.stmt]:
    for statement in module.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            yield from statement.body
        else:
            yield statement


def bound_names(node: ast.AST) -> set[str]:
    """The names a top-level statement binds or changes."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Import():
            return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        case ast.ImportFrom():
            return {alias.asname or alias.name for alias in node.names}
        case ast.Assign():
            inner: list[Any] = list(node.targets)
        case ast.AnnAssign() | ast.AugAssign():
            inner = [node.target]
        case ast.Tuple() | ast.List():
            inner = list(node.elts)
        case ast.For():
            inner = [node.target, *node.body]
        case ast.If() | ast.While() | ast.With() | ast.Try() | ast.ExceptHandler():
            inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.ExceptHandler)]
        case ast.Name() | ast.Attribute() | ast.Subscript() | ast.Starred():
            *_, root = leftwards(node)
            return {root.id} if isinstance(root, ast.Name) else set()
        case _:
            return set()
    return set().union(*map(bound_names, inner))


def free_and_local_names(text: str, known: set[str]) -> tuple[set[str], set[str]]:
    """The names that a text reads from its module, and those local to some definition in it.

    Args:
        text: Python source.
        known: the names that its module binds.
    """
    top = symtable.symtable(text, "text", "exec")
    free, local, tables = set(), set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            name, is_used = symbol.get_name(), symbol.is_referenced()
            if table is top:
                free |= {name} if is_used else set()
                continue
            (free if symbol.is_global() else local).add(name)
            # The body of a class reads a name from the module until it binds it itself.
            free |= {name} if table.get_type() == "class" and is_used and name in known else set()
    return free, local
