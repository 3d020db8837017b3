"""Definitions copied out of Python modules, with all they use, for a file that stands alone."""

import ast
import builtins
import graphlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, final

from kdnas.students.modules import ModuleText, bound_names, free_and_local_names, importable, leftwards

WIDTH = 120


@final
class Import(NamedTuple):
    """`import module` or `from module import attribute`, perhaps `as alias`."""

    module: str
    attribute: str | None = None
    alias: str | None = None

    @property
    def bound_name(self) -> str:
        """The name it binds."""
        return self.alias or self.attribute or self.module.partition(".")[0]

    def __str__(self) -> str:
        name = self.attribute or self.module
        return name if self.alias in (None, name) else f"{name} as {self.alias}"


@final
class Definition(NamedTuple):
    """A name that the top level of a module defines."""

    module: str
    name: str


Meaning = Definition | Import | ModuleType | None
"""The referent of a name in a module; None is a builtin."""


@final
class Definitions:
    """The definitions and imports that some names need, each under one name in the file to be written.

    Torch and the standard library are imported, everything else is copied as it stands: functions, classes and
    constants, found by reading the modules, not by running anything in them again. Where two modules use one name for
    two things, the second is renamed.

    Args:
        packages: top-level packages whose code may be copied although they are installed.
        reserved: names that the file uses otherwise.
    """

    def __init__(self, packages: Iterable[str], reserved: Iterable[str] = ()) -> None:
        self._packages = set(packages)
        self._modules: dict[str, ModuleText] = {}
        self._names: dict[Definition, str] = {}
        self._imports: set[Import] = set()
        self._meanings: dict[str, Any] = dict.fromkeys(reserved, object())
        self._texts: dict[str, dict[int, str]] = {}
        self._needs: dict[str, set[str]] = {}

    def name(self, module: str, name: str) -> str:
        """The file's name for `name` of `module`.

        Raises:
            ValueError: it has no readable definition, or it needs a package that is neither torch nor copied.
        """
        meaning = self.find(module, name)
        if isinstance(meaning, ModuleType):
            raise ValueError(f"{module} uses the module {meaning.__name__} as a value. Use its attributes by name.")
        if isinstance(meaning, Import):
            return self.name_import(meaning)
        return name if meaning is None else self._copy(meaning)

    def name_import(self, statement: Import) -> str:
        """The name under which the file imports it."""
        live = importlib.import_module(statement.module)
        if statement.attribute is not None:
            live = getattr(live, statement.attribute)
        elif statement.alias is None:
            live = sys.modules[statement.bound_name]
        wanted, number = statement.bound_name, 2
        while self._meanings.get(statement.bound_name, live) is not live:
            statement, number = statement._replace(alias=f"{wanted}_{number}"), number + 1
        is_submodule = statement.alias is None and "." in statement.module and not statement.attribute
        if statement.bound_name not in self._meanings or is_submodule:
            self._imports.add(statement)
        self._meanings[statement.bound_name] = live
        return statement.bound_name

    def find(self, module: str, name: str) -> Meaning:
        """Follow a name to its definition, or to the import that the file repeats."""
        text = self._module(module)
        statements = text.statements.get(name, [])
        if not statements:
            if hasattr(builtins, name) or name in ("__name__", "__file__"):
                return None
            raise ValueError(f"{module} has no readable definition of {name!r}. Define or import it by that name.")
        imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
        if not imports:
            self._check_copyable(text, name)
            return Definition(module, name)
        if len(imports) < len(statements):
            raise ValueError(f"{module} imports {name!r} and changes it. Assign the changed value to another name.")
        statement = imports[-1]
        alias = next(a for a in statement.names if name == (a.asname or a.name.partition(".")[0]))
        if isinstance(statement, ast.ImportFrom):
            target = importlib.util.resolve_name("." * statement.level + (statement.module or ""), text.package)
            if importable(target):
                return Import(target, alias.name, alias.asname)
            live = getattr(importlib.import_module(target), alias.name, None)
            return live if isinstance(live, ModuleType) else self.find(target, alias.name)
        if importable(alias.name):
            return Import(alias.name, None, alias.asname)
        return importlib.import_module(alias.name if alias.asname else name)

    def find_attribute(self, module: str, node: ast.Attribute) -> Definition | None:
        """The definition behind an attribute of a copied module (`blocks.basic.resize`); None for other attributes."""
        *attributes, root = leftwards(node)
        live: Meaning = self.find(module, root.id) if isinstance(root, ast.Name) else None
        owner = None
        for attribute in reversed(attributes):
            if not isinstance(live, ModuleType) or not isinstance(attribute, ast.Attribute):
                return None
            owner, live = live, getattr(live, attribute.attr, None)
        return None if owner is None or isinstance(live, ModuleType) else Definition(owner.__name__, node.attr)

    def use(self, module: str, owner: str, name: str) -> str:
        """The file's name for `name` of `owner`, for code of `module`, which is to come after it."""
        meaning = self.find(owner, name)
        if isinstance(meaning, Definition) and meaning.module != module:
            self._needs.setdefault(module, set()).add(meaning.module)
        return self.name(owner, name)

    def import_lines(self) -> list[str]:
        """The import statements: the standard library, then torch."""
        sections = [["from __future__ import annotations"]] if any(m.future for m in self._modules.values()) else []
        for of_torch in (False, True):
            part = [i for i in self._imports if (i.module.partition(".")[0] == "torch") is of_torch]
            part.sort(key=lambda i: (i.module, i.attribute or "", i.alias or ""))
            lines = [f"import {i}" for i in part if i.attribute is None]
            for module in dict.fromkeys(i.module for i in part if i.attribute is not None):
                members = [str(i) for i in part if i.module == module and i.attribute is not None]
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
                f"the modules {', '.join(sorted(set(error.args[1])))} use each other. Put what they share into a third."
            ) from error
        texts = []
        for module in order:
            own = [text for _, text in sorted(self._texts.get(module, {}).items())]
            texts += [f"# {module}\n{own[0]}", *own[1:]] if own else []
        return texts

    def _module(self, name: str) -> "ModuleText":
        if name not in self._modules:
            self._modules[name] = ModuleText(name)
        return self._modules[name]

    def _check_copyable(self, module: "ModuleText", name: str) -> None:
        file = Path(inspect.getfile(module.live))
        installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
        if installed and module.live.__name__.partition(".")[0] not in self._packages:
            raise ValueError(
                f"student.py may import torch and the standard library only, but a layer uses {name!r} of "
                f"{module.live.__name__}. Write it with torch in the layer's own module."
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
                copied = _Copy(self, module, statement)
                texts[statement.lineno] = copied.text()
        return chosen


@final
class _Copy(ast.NodeTransformer):
    """One top-level statement, with the names of the file it goes to."""

    def __init__(self, definitions: Definitions, module: ModuleText, statement: ast.stmt) -> None:
        self._definitions, self._module = definitions, module.live.__name__
        self._original = module.text(statement)
        self._free, self._local = free_and_local_names(self._original, set(module.statements))
        self._free |= bound_names(statement)
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
        *_, root = leftwards(node)
        if isinstance(root, ast.Name) and root.id in self._free:
            definition = self._definitions.find_attribute(self._module, node)
            if definition is not None:
                self._is_changed = True
                return ast.copy_location(ast.Name(self._renamed(root.id, *definition), node.ctx), node)
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


def bracketed(before: str, items: list[str], after: str, indent: int) -> list[str]:
    """The line, or one item a line where it is too long."""
    space = " " * indent
    line = f"{space}{before}{', '.join(items)}{after}"
    if len(line) <= WIDTH:
        return [line]
    return [space + before, *(f"{space}    {item}," for item in items), space + after]
