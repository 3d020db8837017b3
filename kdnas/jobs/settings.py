"""What a person decides, as frozen values that `run.json` shows and any later command builds again."""

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, final

from kdnas.cost import COUNTS, Budget
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.network import Network
from kdnas.scorers.rdm import Rdm
from kdnas.searchers.evolution import Evolution
from kdnas.space import SearchSpace
from kdnas.spec import Spec, named, nearest, resolve, spec
from kdnas.supernet import Supernet
from kdnas.tables import shared_folder, space_from_table, structure, table_of, unstructure
from kdnas.training import Distiller, Recipe

_Settings = TypeVar("_Settings")


@final
@dataclass(frozen=True, kw_only=True)
class Train:
    """Supernet training under a teacher.

    Attributes:
        space: the search space; its classes and channels are taken from the data.
        data: makes the Data.
        teacher: makes the teacher, given `classes` and `preprocessing`; None trains one in the run.
        distiller: the supernet's way of learning; None trains no supernet, and candidates are then scored by what needs
            none of its weights, such as a short training of each.
        recipe: of the supernet.
        teacher_recipe: of a teacher trained in the run.
        teacher_snapshots: at how many equal intervals of its training such a teacher is kept; with more than one, the
            run's teacher is their `Route`.
        teacher_members: how many such teachers are trained, with the seeds from the recipe's on; with more than one,
            the run's teacher is their `Ensemble`.
        teacher_blocks: residual blocks per stage of such a teacher; 0 for what suits the size of the images.
        teacher_views: 0 to run the teacher at every step on fresh augmentations; otherwise the supernet sees so many
            fixed augmentations of each image, and the teacher's outputs on them are computed once and kept in the run.
        cache_limit: most gigabytes that those may take.
        weights: a safetensors file that the supernet starts from, such as `kdnas convert` writes; none if empty.
        share: makes the supernet's sharing rule, such as `KernelTransform`; None is the leading corner.
        rollback: whether a collapse is taken back, once, to the last healthy weights.
    """

    space: SearchSpace
    data: Spec
    teacher: Spec | None = None
    distiller: Spec | None = spec(Sandwich)
    recipe: Recipe = Recipe()
    teacher_recipe: Recipe = Recipe()
    teacher_snapshots: int = 1
    teacher_members: int = 1
    teacher_blocks: int = 0
    share: Spec | None = None
    rollback: bool = False
    teacher_views: int = 0
    cache_limit: float = 4.0
    weights: str = ""

    def __post_init__(self) -> None:
        if self.distiller is not None:
            _check_teaches(self.distiller, Supernet)
        if not 1 <= self.teacher_snapshots <= self.teacher_recipe.steps:
            raise ValueError(
                f"teacher_snapshots must lie between 1 and the teacher's {self.teacher_recipe.steps} steps, got "
                f"{self.teacher_snapshots}."
            )
        if self.teacher_members < 1:
            raise ValueError(f"teacher_members must be at least 1, got {self.teacher_members}.")
        if self.teacher_blocks < 0:
            raise ValueError(f"teacher_blocks must not be negative, got {self.teacher_blocks}.")
        if self.teacher_members > 1 and self.teacher_snapshots > 1:
            raise ValueError("a teacher is a route of snapshots or an ensemble of members. Set one of the two to 1.")
        if self.teacher_views < 0:
            raise ValueError(f"teacher_views must not be negative, got {self.teacher_views}.")


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """Ranking of subnets.

    Attributes:
        scorer: higher is better.
        searcher: who proposes; built with `space`, `admits` and `rng`.
        budget: hard bounds.
        num_evaluations: unique architectures.
        max_time: seconds, in equal parts for the search and each of its controls.
        num_images: of the search part, the evidence.
        control: also run random search at equal cost.
        contrast: a second scorer, under which the same searcher runs again at equal cost, such as a short training
            without the teacher; how the two rankings and the networks they find differ is recorded. None for none.
        pruner: makes a pruner of Optuna, which may stop an evaluation early where the scorer shows scores on its way,
            such as a short training of several rungs; None to evaluate everything whole.
        initial: how many of the best networks of the run's search before are scored first, and begin this one: the
            second phase of a multi-fidelity search, under a scorer of higher fidelity.
        exact: of a run trained block-wise, rate every path of every block once and rank the best networks exactly, in
            place of scorer and searcher; `max_time` then bounds the controls only.
        seed: of the searcher.
    """

    scorer: Spec = spec(Rdm)
    searcher: Spec = spec(Evolution)
    budget: Budget = Budget()
    num_evaluations: int = 200
    max_time: float = 1e9
    num_images: int = 256
    control: bool = True
    contrast: Spec | None = None
    pruner: Spec | None = None
    initial: int = 0
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_evaluations", 1), ("num_images", 3), ("initial", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.max_time <= 0:
            raise ValueError(f"max_time must be positive, got {self.max_time}.")
        if self.exact:
            self.budget.only(COUNTS, "an exact search")


@final
@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Training of an exported student.

    Attributes:
        distiller: with a teacher, or `FromLabels` without.
        recipe: how long and how fast.
        weights: `fresh`, or `inherited` from the supernet.
        num_random: how many random subnets within the budget a whole chain retrains beside it, as a control.
    """

    distiller: Spec = spec(FromTeacher)
    recipe: Recipe = Recipe()
    weights: Literal["fresh", "inherited"] = "fresh"
    num_random: int = 1

    def __post_init__(self) -> None:
        _check_teaches(self.distiller, Network)
        if self.weights not in ("fresh", "inherited"):
            raise ValueError(f"weights must be fresh or inherited, got {self.weights!r}.")


def _check_teaches(distiller: Spec, model: type[Supernet | Network]) -> None:
    """Before anything is trained; what a function makes is seen when it is made."""
    made = resolve(distiller.make)
    if isinstance(made, type) and issubclass(made, Distiller):
        made.check_teaches(model)


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The whole chain: train, search, export, retrain.

    Attributes:
        second: another search behind the first, which may begin from its best (`initial`); the last one's best is
            exported. None for none.
    """

    train: Train
    search: Search = field(default_factory=Search)
    retrain: Retrain = field(default_factory=Retrain)
    second: Search | None = None

    def __post_init__(self) -> None:
        if self.search.initial:
            raise ValueError("the first search has none before it to begin from. Set its initial to 0.")
        if self.train.distiller is None and self.retrain.weights == "inherited":
            raise ValueError("a run without a supernet has no weights to inherit. Retrain from fresh ones.")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal Experiment."""
        train = {f.name: getattr(self.train, f.name) for f in dataclasses.fields(self.train)}
        train["space"] = table_of(self.train.space)
        held = {"train": train, "search": self.search, "retrain": self.retrain}
        return unstructure(held if self.second is None else held | {"second": self.second})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Experiment":
        """The Experiment that `to_json` wrote.

        Raises:
            ValueError: an unknown key or a wrong type.
        """
        held = dict(value["train"])
        teacher = held.pop("teacher")
        kinds = {f.name: f.type for f in dataclasses.fields(Train)}
        plain = {name: dict[str, kind] for name, kind in kinds.items() if kind in (int, float, bool, str)}
        train = Train(
            space=space_from_table(held.pop("space")),
            teacher=None if teacher is None else Spec.from_json(teacher),
            data=Spec.from_json(held.pop("data")),
            distiller=None if (taught := held.pop("distiller")) is None else Spec.from_json(taught),
            share=None if (share := held.pop("share", None)) is None else Spec.from_json(share),
            **{name: structure({name: held.pop(name)}, kind)[name] for name, kind in plain.items() if name in held},
            **{name: structure(recipe, Recipe) for name, recipe in held.items()},
        )
        second = structure(value["second"], Search) if "second" in value else None
        search, retrain = structure(value["search"], Search), structure(value["retrain"], Retrain)
        return cls(train=train, search=search, retrain=retrain, second=second)


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
    return spec(FromTeacher, terms=((1.0, named("kdnas.losses", "cross_entropy")), *losses_of(texts)))


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
        made = named("kdnas.losses", name)
        try:
            weight = float(number) if number else getattr(resolve(made.make), "weight", 1.0)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name} must be a number and finite, got {number!r}.")
        terms.append((weight, made))
    return tuple(terms)
