"""Settings from what a person types."""

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kdnas.distillers.base import Distiller
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.settings import Experiment, Recipe
from kdnas.specs import Spec, find_spec, nearest, resolve, spec
from kdnas.tables import shared_folder

_Settings = TypeVar("_Settings")


def load_experiment(text: str) -> Experiment:
    """An experiment from a Python file, or from a file in `experiments/` by its name; see `load_settings`."""
    return load_settings(text, Experiment)


def load_settings(text: str, kind: type[_Settings]) -> _Settings:
    """What a function of a Python file returns, or of a file in `experiments/` by its name.

    The file defines `experiment()`, or any function named after a colon: `file.py:small`.

    Raises:
        ValueError: no such file or function, or it returns something else than the kind asked for.
    """
    place, _, function = text.partition(":")
    path = Path(place)
    if path.suffix != ".py":
        known = {p.stem: p for p in sorted(shared_folder("experiments").glob("*.py"))}
        if place not in known:
            raise ValueError(f"no experiment is named {place!r}.{nearest(place, known)}")
        path = known[place]
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Give a Python file that defines experiment().")
    name = f"kdnas_experiment_{path.stem}"
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}. Mend the file.") from error
    function = function or "experiment"
    if not hasattr(module, function):
        raise ValueError(f"{path} defines no {function}().{nearest(function, dir(module))}")
    made = getattr(module, function)()
    if not isinstance(made, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{function}() of {path} must return {article} {kind.__name__}, it returned a {type(made).__name__}."
        )
    return made


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields changed; those that are None stay."""
    return dataclasses.replace(recipe, **{name: value for name, value in overrides.items() if value is not None})


def terms_of(texts: Sequence[str]) -> Spec:
    """FromTeacher with cross-entropy and the losses named `NAME` or `NAME=WEIGHT`, as `losses_of` reads them."""
    return spec(FromTeacher, terms=((1.0, find_spec("kdnas.losses", "cross_entropy")), *losses_of(texts)))


def with_losses(distiller: Spec | None, texts: Sequence[str]) -> Spec | None:
    """The distiller with these losses as its terms, as `losses_of` reads them; unchanged where there are none.

    Raises:
        ValueError: as `losses_of`, or there is no distiller, or it has no terms to change.
    """
    if not texts:
        return distiller
    if distiller is None:
        raise ValueError("without a supernet no loss trains it. Drop --loss, or name a distiller.")
    changed = distiller.replace(terms=losses_of(texts))
    changed.build(Distiller)
    return changed


def losses_of(texts: Sequence[str]) -> tuple[tuple[float, Spec], ...]:
    """The losses named `NAME` or `NAME=WEIGHT`, each at its default weight, as an objective's terms.

    Raises:
        ValueError: an unknown loss (the nearest is offered) or a weight that is no number.
    """
    terms: list[tuple[float, Spec]] = []
    for text in texts:
        name, _, number = text.partition("=")
        made = find_spec("kdnas.losses", name)
        try:
            weight = float(number) if number else getattr(resolve(made.make), "weight", 1.0)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name} must be a number and finite, got {number!r}.")
        terms.append((weight, made))
    return tuple(terms)
