"""Definitions copied out of Python modules, with all they use, for a file that stands alone."""

import ast
import builtins
import graphlib
import importlib
import importlib.util
import inspect
import symtable
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, final

WIDTH = 120


@final
class Import(NamedTuple):
    """`import module` or `from module import attribute`, perhaps `as alias`."""

    module: str
    attribute: str | None = None
    alias: str | None = None

    @property
    def bound(self) -> str:
        """The name it binds."""
        return self.alias or self.attribute or self.module.partition(".")[0]

    def __str__(self) -> str:
        name = self.attribute or self.module
        return name if self.alias in (None, name) else f"{name} as {self.alias}"


@final
class Definition(NamedTuple):
    """What the top level of a module binds to a name."""

    module: str
    name: str


Found = Definition | Import | ModuleType | None
"""What a name stands for; None is a builtin."""


@final
class Definitions:
    """The definitions and imports that some names need, each under one name in the file to be written.

    Torch and the standard library are imported, everything else is copied as it stands: functions, classes and
    constants, found by reading the modules, not by running anything in them again. Where two modules use one name for
    two things, the second is renamed.

    Args:
        packages: top-level packages whose code may be copied although they are installed.
        reserved: names the file has already given away.
    """

    def __init__(self, packages: Iterable[str], reserved: Iterable[str] = ()) -> None:
        self._packages = set(packages)
        self._modules: dict[str, _Module] = {}
        self._names: dict[Definition, str] = {}
        self._imports: set[Import] = set()
        self._meanings: dict[str, Any] = dict.fromkeys(reserved, object())
        self._texts: dict[str, dict[int, str]] = {}
        self._needs: dict[str, set[str]] = {}

    def name(self, module: str, name: str) -> str:
        """The name, in the file, of what `name` is in `module`.

        Raises:
            ValueError: it has no readable definition, or it needs a package that is neither torch nor copied.
        """
        found = self.find(module, name)
        if isinstance(found, ModuleType):
            raise ValueError(f"{module} uses the module {found.__name__} as a value. Use its attributes by name.")
        if isinstance(found, Import):
            return self.name_import(found)
        return name if found is None else self._copy(found)

    def name_import(self, one: Import) -> str:
        """The name under which the file imports it."""
        live = importlib.import_module(one.module)
        if one.attribute is not None:
            live = getattr(live, one.attribute)
        elif one.alias is None:
            live = sys.modules[one.bound]
        wanted, number = one.bound, 2
        while self._meanings.get(one.bound, live) is not live:
            one, number = one._replace(alias=f"{wanted}_{number}"), number + 1
        if one.bound not in self._meanings or (one.alias is None and "." in one.module and not one.attribute):
            self._imports.add(one)
        self._meanings[one.bound] = live
        return one.bound

    def find(self, module: str, name: str) -> Found:
        """Follow a name to its definition, or to the import that the file repeats."""
        held = self._module(module)
        statements = held.statements.get(name, [])
        if not statements:
            if hasattr(builtins, name) or name in ("__name__", "__file__"):
                return None
            raise ValueError(f"{module} has no readable definition of {name!r}. Define or import it by that name.")
        imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
        if not imports:
            self._check_copyable(held, name)
            return Definition(module, name)
        if len(imports) < len(statements):
            raise ValueError(f"{module} imports {name!r} and changes it. Give the changed value another name.")
        statement = imports[-1]
        alias = next(a for a in statement.names if name == (a.asname or a.name.partition(".")[0]))
        if isinstance(statement, ast.ImportFrom):
            target = importlib.util.resolve_name("." * statement.level + (statement.module or ""), held.package)
            if importable(target):
                return Import(target, alias.name, alias.asname)
            live = getattr(importlib.import_module(target), alias.name, None)
            return live if isinstance(live, ModuleType) else self.find(target, alias.name)
        if importable(alias.name):
            return Import(alias.name, None, alias.asname)
        return importlib.import_module(alias.name if alias.asname else name)

    def find_attribute(self, module: str, node: ast.Attribute) -> Definition | None:
        """What an attribute of a copied module stands for, such as `blocks.basic.resize`; None for other attributes."""
        *attributes, root = _leftwards(node)
        live: Found = self.find(module, root.id) if isinstance(root, ast.Name) else None
        owner = None
        for attribute in reversed(attributes):
            if not isinstance(live, ModuleType) or not isinstance(attribute, ast.Attribute):
                return None
            owner, live = live, getattr(live, attribute.attr, None)
        return None if owner is None or isinstance(live, ModuleType) else Definition(owner.__name__, node.attr)

    def use(self, module: str, owner: str, name: str) -> str:
        """The name, in the file, of what `name` is in `owner`, for code of `module`, which is to come after it."""
        found = self.find(owner, name)
        if isinstance(found, Definition) and found.module != module:
            self._needs.setdefault(module, set()).add(found.module)
        return self.name(owner, name)

    def import_lines(self) -> list[str]:
        """The import statements: the standard library, then torch."""
        sections = [["from __future__ import annotations"]] if any(m.future for m in self._modules.values()) else []
        for of_torch in (False, True):
            part = [one for one in self._imports if (one.module.partition(".")[0] == "torch") is of_torch]
            part.sort(key=lambda one: (one.module, one.attribute or "", one.alias or ""))
            lines = [f"import {one}" for one in part if one.attribute is None]
            for module in dict.fromkeys(one.module for one in part if one.attribute is not None):
                members = [str(one) for one in part if one.module == module and one.attribute is not None]
                # Constants, classes, the rest: the order of import sorters.
                members.sort(key=lambda member: (not member.isupper(), not member[0].isupper(), member))
                line = f"from {module} import {', '.join(members)}"
                lines += [line] if len(line) <= WIDTH else bracketed(f"from {module} import (", members, ")", 0)
            sections += [lines] if lines else []
        return [line for section in sections for line in ["", *section]][1:]

    def texts(self) -> list[str]:
        """The copied definitions: a module after those it uses, and in a module in its own order."""
        try:
            order = list(graphlib.TopologicalSorter(self._needs).static_order())
        except graphlib.CycleError as error:
            raise ValueError(
                f"the modules {', '.join(sorted(set(error.args[1])))} use each other. Put what they share into one."
            ) from error
        texts = []
        for module in order:
            own = [text for _, text in sorted(self._texts.get(module, {}).items())]
            texts += [f"# {module}\n{own[0]}", *own[1:]] if own else []
        return texts

    def _module(self, name: str) -> "_Module":
        if name not in self._modules:
            self._modules[name] = _Module(name)
        return self._modules[name]

    def _check_copyable(self, module: "_Module", name: str) -> None:
        file = Path(inspect.getfile(module.live))
        installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
        if installed and module.live.__name__.partition(".")[0] not in self._packages:
            raise ValueError(
                f"a file that stands alone may import torch and the standard library only, and a layer uses {name!r} "
                f"of {module.live.__name__}. Write it with torch in the layer's own module."
            )

    def _copy(self, definition: Definition) -> str:
        if definition in self._names:
            return self._names[definition]
        chosen, number = definition.name, 2
        while chosen in self._meanings:
            chosen, number = f"{definition.name}_{number}", number + 1
        # Named before it is read: a definition may use itself.
        self._meanings[chosen] = definition
        self._names[definition] = chosen
        module, texts = self._module(definition.module), self._texts.setdefault(definition.module, {})
        self._needs.setdefault(definition.module, set())
        for statement in module.statements[definition.name]:
            if statement.lineno not in texts:
                texts[statement.lineno] = ""
                copied = _Copied(self, module, statement)
                texts[statement.lineno] = copied.text()
        return chosen


@final
class _Module:
    """A module's text, and which of its top-level statements bind a name."""

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
            for bound in _bound(statement):
                self.statements.setdefault(bound, []).append(statement)

    def text(self, statement: ast.stmt) -> str:
        """The statement as it stands, with its decorators and the comment above it."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while first > 1 and self._lines[first - 2].startswith("#"):
            first -= 1
        return textwrap.dedent("\n".join(self._lines[first - 1 : statement.end_lineno]))


@final
class _Copied(ast.NodeTransformer):
    """One top-level statement, with the names of the file it goes to."""

    def __init__(self, definitions: Definitions, module: _Module, statement: ast.stmt) -> None:
        self._definitions, self._module = definitions, module.live.__name__
        self._original = module.text(statement)
        self._free, self._local = _names(self._original, set(module.statements))
        self._free |= _bound(statement)
        self._is_changed = False

    def text(self) -> str:
        """As it stands where no name changes; otherwise written anew, without its comments."""
        tree = self.visit(ast.parse(self._original))
        return ast.unparse(tree) if self._is_changed else self._original

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A name of the module's top level, or a local one."""
        if node.id in self._free:
            node.id = self._renamed(node.id, self._module, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """An attribute of a copied module becomes a plain name."""
        *_, root = _leftwards(node)
        if isinstance(root, ast.Name) and root.id in self._free:
            found = self._definitions.find_attribute(self._module, node)
            if found is not None:
                self._is_changed = True
                return ast.copy_location(ast.Name(self._renamed(root.id, *found), node.ctx), node)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """The class's own name."""
        return self._own(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """The function's own name."""
        return self._own(node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        """An import inside a block stays, so it has to be of torch or the standard library."""
        return self._checked(node, [alias.name for alias in node.names])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        """As `visit_Import`."""
        return self._checked(node, ["." * node.level + (node.module or "")])

    def _checked(self, node: ast.AST, modules: list[str]) -> ast.AST:
        for name in modules:
            if not importable(name):
                raise ValueError(f"{self._module} imports {name!r} inside a block. Import it at the top of the module.")
        return node

    def _own(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        if node.col_offset == 0:
            node.name = self._renamed(node.name, self._module, node.name)
        return self.generic_visit(node)

    def _renamed(self, written: str, owner: str, name: str) -> str:
        chosen = self._definitions.use(self._module, owner, name)
        if chosen != written:
            if written in self._local:
                raise ValueError(
                    f"{self._module} has {written!r} both at the top level and inside a definition, and another module "
                    "has one too. Rename one of them."
                )
            self._is_changed = True
        return chosen


def importable(module: str) -> bool:
    """Whether a file that stands alone may import it: torch or the standard library."""
    root = module.partition(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


def bracketed(before: str, items: list[str], after: str, indent: int) -> list[str]:
    """The line, or one item a line where it is too long."""
    space = " " * indent
    line = f"{space}{before}{', '.join(items)}{after}"
    if len(line) <= WIDTH:
        return [line]
    return [space + before, *(f"{space}    {item}," for item in items), space + after]


def _top_level(module: ast.Module) -> Iterator[ast.stmt]:
    for statement in module.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            yield from statement.body
        else:
            yield statement


def _leftwards(node: ast.expr) -> Iterator[ast.expr]:
    yield node
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
        yield node


def _bound(node: ast.AST) -> set[str]:
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
            *_, root = _leftwards(node)
            return {root.id} if isinstance(root, ast.Name) else set()
        case _:
            return set()
    return set().union(*map(_bound, inner))


def _names(text: str, known: set[str]) -> tuple[set[str], set[str]]:
    """The names a text takes from its module, which knows these, and those local to some definition in it."""
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
