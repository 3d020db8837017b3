"""A callable and its arguments as a value, and the names by which people type one."""

import contextlib
import difflib
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, final, get_args, get_origin

from kdnas.plain import reason
from kdnas.values import check_arguments, real, shown, whole

_OF_CODE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
)
"""What code raises that is wrong itself."""


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Inside, a person's own code runs; what wrong code raises becomes a ValueError that says where.

    Args:
        name: of the code, for the message.
    """
    try:
        yield
    except _OF_CODE as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" (line {frame.lineno} of {Path(frame.filename).name})"
        raise ValueError(f"{name} cannot be run: {reason(error, named=True)}{place}. Mend it.") from error


@final
@dataclass(frozen=True)
class Spec:
    """A callable's import path and its keyword arguments. Immutable, equal by content, JSON.

    Settings hold specs instead of modules: a run builds each as often as it needs to, `run.json` shows it, and any
    later command can build it again. `spec` makes one.

    Attributes:
        make: `package.module:name`.
        arguments: sorted pairs of name and value; a value is a plain value, a tuple or a Spec.

    Example:
        >>> linear = spec("torch.nn:Linear", in_features=2, out_features=3)
        >>> linear.build()
        Linear(in_features=2, out_features=3, bias=True)
        >>> linear.replace(bias=False).to_json()
        {'make': 'torch.nn:Linear', 'arguments': {'bias': False, 'in_features': 2, 'out_features': 3}}
    """

    make: str
    arguments: tuple[tuple[str, Any], ...] = ()
    own_json: ClassVar[bool] = True

    def build(self, expect: type | None = None, **more: Any) -> Any:
        """Import the callable and call it; specs among the arguments are passed on unbuilt.

        Args:
            expect: the class of which the callable must be a subclass or, for a function, return an instance.
            **more: arguments only known at run time.

        Raises:
            ValueError: the path cannot be imported, an argument is unknown or missing, the class is another, or code
                that is not of kdnas fails.
        """
        target = resolve(self.make)
        if expect is not None:
            _check_returns(self.make, target, expect)
        arguments = dict(self.arguments) | more
        _check_arguments(self.make, target, arguments)
        if self.make.startswith("kdnas."):
            built = target(**arguments)
        else:
            with running(self.make):
                built = target(**arguments)
        if expect is not None and not isinstance(built, expect):
            advice = getattr(expect, "advice", "")
            raise ValueError(
                f"{self.make} must return a {expect.__name__}, it returned a {type(built).__name__}.{advice}"
            )
        return built

    def replace(self, **arguments: Any) -> "Spec":
        """The same callable with some arguments changed or added."""
        return spec(self.make, **(dict(self.arguments) | arguments))

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]

    @property
    def name(self) -> str:
        """The name of the file that defines the callable, by which `find_spec` finds an algorithm."""
        return self.make.partition(":")[0].rpartition(".")[2]

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.make.rpartition(':')[2]}({arguments})"

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `Spec.from_json` turns back into an equal Spec."""
        return {"make": self.make, "arguments": {name: _to_json(value) for name, value in self.arguments}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Spec":
        """The Spec that `to_json` wrote."""
        if not isinstance(value, Mapping) or set(value) != {"make", "arguments"}:
            raise ValueError(f"a spec has the keys make and arguments, got {shown(value)}.")
        make, arguments = value["make"], value["arguments"]
        if not isinstance(make, str) or not isinstance(arguments, Mapping):
            raise ValueError(f"make of a spec must be a text and arguments an object, got {make!r:.80}.")
        return spec(make, **{name: _from_json(argument) for name, argument in arguments.items()})


def spec(make: Callable[..., Any] | str, **arguments: Any) -> Spec:
    """A Spec from a class, a function or its import path.

    Args:
        make: the class or function, or `package.module:name`.
        **arguments: numbers, strings, None, specs, and lists or tuples of these.

    Raises:
        ValueError: for a callable that cannot be found again by its name, such as a lambda, or another argument.

    Example:
        >>> from fractions import Fraction
        >>> half = spec(Fraction, numerator=1, denominator=2)
        >>> half == spec("fractions:Fraction", denominator=2, numerator=1)
        True
        >>> half.build()
        Fraction(1, 2)
    """
    if not isinstance(make, str):
        path = f"{make.__module__}:{make.__qualname__}"
        if "<" in path:
            raise ValueError(f"{path} has no importable name. Move it to the top of a module and pass it again.")
        make = path
    return Spec(make, tuple(sorted((name, _immutable(value)) for name, value in arguments.items())))


def resolve(path: str) -> Callable[..., Any]:
    """Import `package.module:name`.

    Raises:
        ValueError: the path has another form, or it cannot be imported.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"an import path must be package.module:name, got {path!r}.")
    try:
        target: Any = _imported(module)
    except Exception as error:  # its own code may raise anything
        words = reason(error, named=not isinstance(error, ImportError))
        raise ValueError(f"cannot import {module!r} ({words}). Install it, or run from the folder it is in.") from error
    for attribute in name.split("."):
        if not hasattr(target, attribute):
            raise ValueError(f"{module} has no {shown(name)}.{nearest(attribute, dir(target))}")
        target = getattr(target, attribute)
    if not (inspect.isclass(target) or inspect.isfunction(target)):
        raise ValueError(f"{path} must be a class or a function, it is a {type(target).__name__}.")
    return target


def _imported(module: str) -> Any:
    """A module; where it is not found, the folder of `look_in_working_folder` is searched too, last."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] or not search_last():
            raise
        return importlib.import_module(module)


_LAST: list[str] = []


def look_in_working_folder() -> None:
    """Have the working folder, unless it was removed, searched last for modules that a person names."""
    with contextlib.suppress(FileNotFoundError):
        _LAST[:] = [str(Path.cwd())]


def search_last() -> bool:
    """Search the folder of `look_in_working_folder` from now on; whether it was not searched before."""
    new = [folder for folder in _LAST if folder not in sys.path]
    sys.path += new
    importlib.invalidate_caches()
    return bool(new)


def _check_returns(path: str, target: Callable[..., Any], expect: type) -> None:
    """Refuse a class that is no subclass, and a function whose annotation promises another class, before the call."""
    promised = target if isinstance(target, type) else inspect.signature(target).return_annotation
    if isinstance(promised, str):  # postponed; a name for type checkers only stays a text
        promised = getattr(inspect.getmodule(target), promised, None)
    if isinstance(target, type) and not issubclass(target, expect):
        raise ValueError(f"{path} is not a subclass of {expect.__name__}.")
    if not isinstance(promised, type) or promised is inspect.Signature.empty:
        return
    if not issubclass(promised, expect) and not issubclass(expect, promised):
        advice = getattr(expect, "advice", "")
        raise ValueError(f"{path} must return a {expect.__name__}, it returns a {promised.__name__}.{advice}")


def _check_arguments(path: str, target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    _check_known(path, target, arguments)
    for parameter in _signature(path, target).parameters.values():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.name not in arguments:
            raise ValueError(f"{path} needs the argument {parameter.name!r}.")
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.name in arguments:
            raise ValueError(f"{path} must take the argument {parameter.name!r} by name.")
    try:
        check_arguments(target, arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_inspected = functools.lru_cache(1024)(inspect.signature)  # a network has hundreds of layers, of few classes


def _signature(path: str, target: Callable[..., Any]) -> inspect.Signature:
    try:
        return _inspected(target)
    except ValueError as error:
        raise ValueError(f"{path} says nowhere which arguments it takes. Write a function that calls it.") from error


def _check_known(path: str, target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    parameters = _signature(path, target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise ValueError(f"{path} has no argument {shown(name)}.{nearest(name, list(parameters))}")


def _immutable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_immutable, value))
    if value is None or isinstance(value, Spec | bool | int | float | str):
        return value
    raise ValueError(
        f"arguments of a spec must be numbers, strings, tuples and specs, got {type(value).__name__} {value!r}. "
        "Pass spec(Class, ...) instead of the object."
    )


def _to_json(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    return [_to_json(element) for element in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return Spec.from_json(value)
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


# Names that people type.

_MOST_LISTED = 300  # characters of names in a message


def nearest(name: str, known: Iterator[str] | list[str] | tuple[str, ...] | Mapping[str, Any]) -> str:
    """A sentence that offers the nearest known name, or lists them, up to a line or two, when none is near."""
    names = sorted(known)
    folded = {each.casefold(): each for each in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1)
    close = close or [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=1)]
    if close:
        return f" Did you mean {close[0]!r}?"
    public = [each for each in names if not each.startswith("_")]
    ends = itertools.accumulate(len(each) + 2 for each in public)
    room = sum(end <= _MOST_LISTED for end in ends)
    more = f" and {len(public) - room} more" if room < len(public) else ""
    return f" Known: {', '.join(public[:room])}{more}." if names else " It takes none."


def algorithms(package: str) -> dict[str, str]:
    """The algorithms in a folder, by walking it: file name to import path `module:Class`.

    Each file defines one class that is named after the file; nothing but packages is imported here.
    Where a folder has sub-folders, the algorithms are in those, and its own files are shared code.
    """
    paths: dict[str, str] = {}
    root = importlib.import_module(package)
    has_folders = any(module.ispkg for module in pkgutil.iter_modules(root.__path__))
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        folder, _, name = module.name.rpartition(".")
        shared = (has_folders and folder == package) or name == "base" or name.startswith("_")
        if not module.ispkg and not shared:
            paths[name] = f"{module.name}:{_class_name(module)}"
    return paths


@functools.cache
def _class_name(module: pkgutil.ModuleInfo) -> str:
    """The class that a file is named after, read from its text: `soft_targets` SoftTargets, `vit` ViT."""
    file_name = module.name.rpartition(".")[2]
    loader: Any = getattr(module.module_finder.find_spec(module.name, None), "loader", None)
    text = loader.get_source(module.name) if loader else ""
    classes = re.findall(r"^class (\w+)", text or "", re.MULTILINE)
    near = [name for name in classes if name.lower().startswith(file_name.replace("_", ""))]
    return min(near, key=len, default="".join(part.capitalize() for part in file_name.split("_")))


def find_spec(package: str, name: str, **arguments: Any) -> Spec:
    """The Spec of an algorithm by its file's name, or by `package.module:Class`.

    Raises:
        ValueError: no such file; the nearest name is offered.

    Example:
        >>> find_spec("kdnas.losses", "soft_targets", temperature=4.0).make
        'kdnas.losses.response.soft_targets:SoftTargets'
    """
    if ":" in name:
        return spec(name, **arguments)
    known = algorithms(package)
    if name not in known:
        raise ValueError(f"{shown(name)} is not in {package}.{nearest(name, known)}")
    return spec(known[name], **arguments)


def parse_spec(package: str, text: str) -> Spec:
    """The Spec of `NAME` or `NAME,key=value,key=value`, as a person types it; the name as in `find_spec`.

    A value is a number, `true` or `false`, or else text. Where it is an algorithm, such as a scorer's `members`, joined
    by `+`, it may have options of its own: an option belongs to the nearest algorithm to its left that has it.

    Raises:
        ValueError: an unknown name or key (the nearest is offered), a part without `=`, an option given twice, or a
            value of a wrong type.

    Example:
        >>> parse_spec("kdnas.losses", "soft_targets,temperature=4").arguments
        (('temperature', 4),)
        >>> ensemble = parse_spec("kdnas.scorers", "rank_ensemble,members=in_place,scorer=loss+nwot,num_reference=50")
        >>> ensemble["num_reference"], [str(member) for member in ensemble["members"]]
        (50, ['InPlace(scorer=loss)', 'nwot'])
    """
    name, *options = text.split(",")
    owners = [_Typed(package, name)]
    for option in options:
        key, equals, value = option.partition("=")
        if not (equals and key and value):
            joined = " Several members are joined by +." if any(owner.lists for owner in owners) else ""
            raise ValueError(f"options follow a name as NAME,key=value,key=value, got {option!r} in {text!r}.{joined}")
        place = next((i for i in reversed(range(len(owners))) if owners[i].takes(key)), None)
        if place is None:
            names = " and ".join(owner.name for owner in reversed(owners))
            known = {parameter for owner in owners for parameter in owner.parameters}
            raise ValueError(
                f"{names} {'has' if len(owners) == 1 else 'have'} no option {shown(key)}.{nearest(key, sorted(known))}"
            )
        del owners[place + 1 :]
        listing = next((owner for owner in reversed(owners) if owner.lists), None)
        value, *others = re.split(r"\+(?=[A-Za-z_])", value) if listing or owners[-1].lists_at(key) else [value]
        owners += owners[-1].set(key, value, text)
        for other in others:
            listing = next(owner for owner in reversed(owners) if owner.lists)
            del owners[owners.index(listing) + 1 :]
            owners += listing.add(other)
    return owners[0].spec()


class _Typed:
    """An algorithm whose options are being read.

    Attributes:
        options: values by name: plain ones, algorithms, or lists of these.
        lists: the option that further algorithms after a `+` belong to; empty where there is none.
    """

    def __init__(self, package: str, name: str) -> None:
        self.package, self.name, self.make = package, name, find_spec(package, name).make
        self.parameters = inspect.signature(resolve(self.make)).parameters
        self.options: dict[str, Any] = {}
        self.lists = ""

    def takes(self, key: str) -> bool:
        kinds = [parameter.kind for parameter in self.parameters.values()]
        return key in self.parameters or inspect.Parameter.VAR_KEYWORD in kinds

    def lists_at(self, key: str) -> bool:
        """Whether the option's value is a list of algorithms."""
        kinds = _kinds(self.parameters[key]) if key in _ALGORITHMS and key in self.parameters else ()
        return any(get_origin(kind) is tuple and Spec in _flat(get_args(kind)) for kind in kinds)

    def set(self, key: str, value: str, text: str) -> "list[_Typed]":
        """Set an option; returns the algorithm that its value is, whose options may follow."""
        if key in self.options:
            raise ValueError(f"{key} of {self.name} must be given once, got it again in {text!r}.")
        if self.lists_at(key):
            self.options[key], self.lists = [], key
            return self.add(value)
        if key in _ALGORITHMS and key in self.parameters and Spec in _kinds(self.parameters[key]):
            self.options[key] = _Typed(_ALGORITHMS[key], value)
            return [self.options[key]]
        self.options[key] = _parse_value(value)
        return []

    def add(self, value: str) -> "list[_Typed]":
        """Add an algorithm to the option that lists them."""
        self.options[self.lists].append(_Typed(_ALGORITHMS[self.lists], value))
        return self.options[self.lists][-1:]

    def spec(self) -> Spec:
        """The algorithm with its options; algorithms among them are names where they have none of their own."""
        arguments: dict[str, Any] = {}
        for key, value in self.options.items():
            typed = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, _Typed)]
            by_name = bool(typed) and str in _flat(_kinds(self.parameters[key]))
            if self.lists_at(key) and by_name and not any(v.options for v in typed):
                arguments[key] = "+".join(v.name for v in typed)
            elif typed:
                algorithms = tuple(v.name if by_name and not v.options else v.spec() for v in typed)
                arguments[key] = algorithms if self.lists_at(key) else algorithms[0]
            else:
                arguments[key] = value
        check_typed(self.name, self.make, arguments)
        return spec(self.make, **arguments)


_ALGORITHMS = {
    **dict.fromkeys(("members", "target", "scorer"), "kdnas.scorers"),
    **dict.fromkeys(("distiller", "inner"), "kdnas.distillers"),
    **dict.fromkeys(("loss", "soft", "of"), "kdnas.losses"),
}
"""Folders of algorithms by the names of the parameters that take one, where their annotation has a Spec."""


def _kinds(parameter: inspect.Parameter) -> tuple[Any, ...]:
    annotation = parameter.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)


def _flat(kinds: Sequence[Any]) -> list[Any]:
    """The kinds, and the members of unions among them."""
    return [part for kind in kinds for part in (get_args(kind) if isinstance(kind, UnionType) else (kind,))]


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the typed values of `NAME,key=value,key=value`.

    Raises:
        ValueError: a part without `=`.

    Example:
        >>> split_options("folder:pets,size=64,skip_broken=true")
        ('folder:pets', {'size': 64, 'skip_broken': True})
    """
    name, *options = text.split(",")
    arguments: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (equals and key and value):
            raise ValueError(f"options follow a name as NAME,key=value,key=value, got {option!r} in {text!r}.")
        arguments[key] = _parse_value(value)
    return name, arguments


def check_typed(name: str, path: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError where a typed argument is unknown to the callable of a path, or of a wrong type."""
    target = resolve(path)
    _check_known(path, target, arguments)
    for key, parameter in inspect.signature(target).parameters.items():
        kinds = _kinds(parameter)
        if key in arguments and not _fits(arguments[key], kinds):
            expected = " or ".join(
                _TYPED.get(kind, "made in an experiment file") for kind in kinds if kind is not type(None)
            )
            raise ValueError(f"{key} of {name} must be {expected}, got {arguments[key]!r}.")
    try:
        check_arguments(target, {key: value for key, value in arguments.items() if isinstance(value, int | float)})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


_TYPED = {bool: "true or false", int: "a whole number", float: "a number"}


def _fits(value: Any, kinds: Sequence[Any]) -> bool:
    """Whether a typed value may be of one of these types; others than numbers, tuples and specs check themselves."""
    for kind in kinds:
        if kind is Spec:
            fits = isinstance(value, Spec)
        elif get_origin(kind) is tuple:
            fits = isinstance(value, tuple)
        elif kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        elif kind in (int, bool):
            fits = type(value) is kind
        else:
            fits = kind not in (Spec, type(None))
        if fits:
            return True
    return False


def _parse_value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (whole, real):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_literals(target: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check every argument whose annotation is `Literal[...]`, alone or beside other types.

    Beside other types, as in `Literal["all"] | tuple[int, ...]` or `Literal["all"] | None`, only strings are checked.

    Args:
        target: the class or function that is called; its signature is read.
        values: its arguments by name: `locals()` in a function or constructor, `vars(self)` in a dataclass. Other names
            are ignored.

    Raises:
        ValueError: an argument is none of the values; the message lists them.

    Example:
        >>> def blur(*, mode: Literal["box", "gaussian"] = "box") -> None:
        ...     check_literals(blur, locals())
        >>> blur(mode="median")
        Traceback (most recent call last):
        ValueError: `mode` must be one of box, gaussian, got 'median'.
    """
    for name, parameter in inspect.signature(target).parameters.items():
        annotation = parameter.annotation
        kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        options = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        others = [inspect.formatannotation(kind) for kind in kinds if get_origin(kind) is not Literal]
        if not options or name not in values or (others and not isinstance(values[name], str)):
            continue
        if values[name] not in options:
            known = " or ".join([", ".join(map(str, options)), *others]).replace("NoneType", "None")
            raise ValueError(f"`{name}` must be one of {known}, got {values[name]!r}.")


def face(
    package: str, names: Mapping[str, str], *, with_algorithms: bool = False
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that offers names and imports their modules on first use.

    Unknown names raise an AttributeError that offers the nearest known one. `make format` writes the package's
    `__init__.pyi`, from which type checkers and editors read the same names.

    Args:
        package: its name, `__name__`.
        names: name to the module that defines it; the module `PACKAGE.NAME` itself is offered as a module.
        with_algorithms: also offer the classes of `algorithms(package)`.

    Example:
        >>> import kdnas.losses
        >>> kdnas.losses.SoftTargets.__module__
        'kdnas.losses.response.soft_targets'
    """

    def modules() -> dict[str, str]:
        paths = algorithms(package).values() if with_algorithms else ()
        return {name: module for module, _, name in (path.partition(":") for path in paths)} | dict(names)

    def getattr_(name: str) -> Any:
        module = names.get(name) or (None if name.startswith("_") else modules().get(name))
        if module is None:
            hint = "" if name.startswith("_") else nearest(name, modules())
            raise AttributeError(f"module {package!r} has no attribute {name!r}.{hint}")
        imported = importlib.import_module(module)
        return imported if module == f"{package}.{name}" else getattr(imported, name)

    def dir_() -> list[str]:
        public = {name for name in vars(sys.modules[package]) if not name.startswith("_")} - {"face"}
        return sorted(public | set(modules()))

    return getattr_, dir_
