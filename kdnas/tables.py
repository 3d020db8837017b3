"""TOML and JSON tables to frozen values and back."""

import functools
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from kdnas.plain import printable, printable_content
from kdnas.space import SearchSpace
from kdnas.specs import Spec, algorithms, nearest, resolve
from kdnas.trust import admit, trusting
from kdnas.values import LATER, check_fields, shown

_MOST = 5  # mistakes that a message names
_DEEPEST = 64  # levels of lists and tables
_LARGEST = 4 * 2**20  # bytes of a table; that of a converted network has some 100 thousand
_LONG_KEY = re.compile(r"""(?<![\w\-"'.])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){16}""")


def shared_folder(name: str) -> Path:
    """`search_spaces` or `experiments`, in a checkout or inside an installed package."""
    package = Path(__file__).parent
    installed = package / "_shared" / name
    return installed if installed.is_dir() else package.parent / name


def load_space(table: str | Path, *, trust: bool = False) -> SearchSpace:
    """A search space from a TOML file, or by its name in `search_spaces/`.

    The key `family` names a module of `kdnas.spaces`, or `package.module:Class`; every other
    key is a field of that family's dataclass.

    Args:
        table: a path that ends in `.toml`, or a name from `kdnas list spaces`.
        trust: run what the table names, where that is not kdnas's own.

    Raises:
        Untrusted: it names a family that is not kdnas's own; see `kdnas.trust.admit`.
        ValueError: no such table, not TOML, an unknown family or key (the nearest is offered), a wrong type, a
            number out of range, or a space with fewer than two architectures.

    Example:
        >>> space = load_space("toy")
        >>> space.count()
        36
        >>> [choice.name for choice in space.choices][:3]
        ['stage0.depth', 'stage0.layer0.width', 'stage0.layer1.width']
    """
    path = Path(table)
    if path.suffix != ".toml":
        known = {p.stem: p for p in sorted(shared_folder("search_spaces").glob("*.toml"))}
        if str(table) not in known:
            raise ValueError(f"there is no search space {shown(str(table))}.{nearest(str(table), known)}")
        path = known[str(table)]
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Give the path of a TOML table or a name from `kdnas list spaces`.")
    try:
        content = _toml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    with trusting(trust):
        admit(content, path)
    content.setdefault("name", path.stem)
    try:
        space = space_from_table(content)
        if space.count() < 2:
            raise ValueError(
                f"a search space must have at least two architectures, got {space.count()}. Give some choice a second "
                "option."
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return space


def _toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file with `printable` texts.

    Raises:
        ValueError: it is no TOML, or larger or more deeply nested than any table: the parser's time grows with the
            square of a key's parts.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows marks the beginning
        if _LONG_KEY.search(text):
            raise ValueError("a key has more than 16 parts")
        content = tomllib.loads(text)
        if _depth(content) > _DEEPEST:
            raise RecursionError
        return printable_content(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None


def _depth(value: Any) -> int:
    """Levels of lists and tables."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_depth, inner), default=0) + 1


def space_from_table(content: Mapping[str, Any]) -> SearchSpace:
    """A search space from the content of a table; see `load_space`."""
    content = dict(content)
    family = content.pop("family", None)
    if not isinstance(family, str):
        raise ValueError('a search space must have the key `family`, such as family = "mbconv".')
    space: SearchSpace = structure(content, _family(family))
    check_fields(space)  # a family of one's own may have a `__post_init__` that does not
    return space


def table_of(space: SearchSpace) -> dict[str, Any]:
    """The mapping from which `space_from_table` makes an equal space."""
    return unstructure(space)


def structure(content: Any, kind: Any) -> Any:
    """Plain content to a value of `kind`; unknown keys and wrong types are refused.

    Raises:
        ValueError: with the path of the offending key and the nearest known name.
    """
    try:
        return _converter().structure(content, kind)
    except cattrs.BaseValidationError as error:
        sentences = _explain(error)
        more = f"; and {len(sentences) - _MOST} more" if len(sentences) > _MOST else ""
        raise ValueError("; ".join(sentences[:_MOST]) + more) from error


def unstructure(value: Any) -> Any:
    """A value as plain JSON content."""
    return json.loads(json.dumps(_converter().unstructure(value)))


def _family(name: str) -> type[SearchSpace]:
    """The class of a family, by the name of its file or its import path."""
    known = algorithms("kdnas.spaces")
    if ":" not in name and name not in known:
        raise ValueError(f"there is no family {shown(name)}.{nearest(name, known)}")
    family = resolve(known.get(name, name))
    if not (isinstance(family, type) and issubclass(family, SearchSpace)):
        raise ValueError(f"family {name} is not a subclass of SearchSpace.")
    return family


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)

    def strict(kind: type) -> Any:
        def check(value: Any, _: Any) -> Any:
            if kind is float and type(value) is int:
                return float(value)
            if type(value) is not kind:
                raise ValueError(f"must be {'an' if kind is int else 'a'} {kind.__name__}, got {shown(value)}")
            return value

        return check

    def table_only(function: Any) -> Any:
        def check(value: Any, kind: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"must be a table, got a value of type {type(value).__name__}")
            return function(value, kind)

        return check

    for kind in (int, float, bool, str):
        converter.register_structure_hook(kind, strict(kind))
    for union in (int | float | str, int | float, str | int):
        converter.register_structure_hook(union, lambda value, _: value)
    converter.register_structure_hook_factory(
        lambda kind: hasattr(kind, "__dataclass_fields__"),
        lambda kind: table_only(make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)),
    )
    converter.register_structure_hook_factory(
        lambda kind: Spec in typing.get_args(kind),
        lambda kind: functools.partial(_structure_choice, converter, typing.get_args(kind)),
    )
    converter.register_structure_hook_func(lambda kind: kind is SearchSpace, lambda value, _: space_from_table(value))
    converter.register_unstructure_hook_factory(lambda kind: bool(_later(kind)), lambda kind: _earlier(kind, converter))
    converter.register_unstructure_hook_func(
        lambda kind: isinstance(kind, type) and issubclass(kind, SearchSpace),
        lambda space: _family_key(type(space)) | make_dict_unstructure_fn(type(space), converter)(space),
    )
    # Such a class says itself how its values are written.
    converter.register_structure_hook_func(
        lambda kind: getattr(kind, "own_json", False), lambda value, kind: kind.from_json(value)
    )
    converter.register_unstructure_hook_func(
        lambda kind: getattr(kind, "own_json", False), lambda value: value.to_json()
    )
    return converter


def _later(kind: Any) -> list[str]:
    """Names of a dataclass's fields that are marked by `LATER`."""
    known = getattr(kind, "__dataclass_fields__", {})
    return [name for name, known_field in known.items() if LATER.items() <= known_field.metadata.items()]


def _earlier(kind: Any, converter: cattrs.Converter) -> Any:
    """Writes a dataclass without its later fields where they have their default."""
    overrides: Any = {name: override(omit_if_default=True) for name in _later(kind)}
    return make_dict_unstructure_fn(kind, converter, **overrides)


def _family_key(kind: type) -> dict[str, str]:
    module = kind.__module__
    own = module.startswith("kdnas.spaces.")
    return {"family": module.removeprefix("kdnas.spaces.") if own else f"{module}:{kind.__qualname__}"}


def _structure_choice(converter: cattrs.Converter, kinds: tuple[Any, ...], value: Any, _: Any) -> Any:
    """A value of a union with Spec: None, a spec by its keys, or the other kind."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind not in (Spec, type(None))]
    is_spec = not others or (isinstance(value, Mapping) and "make" in value)
    return Spec.from_json(value) if is_spec else converter.structure(value, others[0])


def _explain(error: BaseException, where: str = "") -> list[str]:
    """One sentence per leaf of cattrs' tree of errors."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = list(getattr(error.cl, "__dataclass_fields__", {}))
        prefix = f"{where}: " if where else ""
        return [f"{prefix}unknown key {shown(key)}.{nearest(key, known)}" for key in sorted(error.extra_fields)]
    if isinstance(error, ExceptionGroup):
        sentences = []
        for inner in error.exceptions:
            note = next((n for n in getattr(inner, "__notes__", []) if hasattr(n, "name") or hasattr(n, "index")), None)
            step = f".{note.name}" if hasattr(note, "name") else f"[{note.index}]" if note is not None else ""
            sentences += _explain(inner, (where + step).lstrip("."))
        return sentences
    if isinstance(error, KeyError):
        return [f"{where or 'table'} is missing"]
    match = re.fullmatch(r"'(\w+)' object is not iterable", str(error))
    if match:  # Python's own words
        return [f"{where} must be a list, got a value of type {match[1]}"]
    return [printable(f"{where} {error}".strip())[:200]]
