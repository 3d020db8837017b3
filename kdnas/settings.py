"""What a person decides, as frozen values that `run.json` shows and any later command builds again."""

import ast
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from kdnas.costs.budget import COUNTS, Budget
from kdnas.space import SearchSpace
from kdnas.specs import Spec, check_literals, nearest, spec
from kdnas.tables import shared_folder, space_from_table, structure, table_of, unstructure


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast.

    Attributes:
        steps: optimiser steps.
        batch_size: images per step.
        optimizer: `sgd` (Nesterov momentum 0.9) or `adamw`.
        learning_rate: the peak.
        weight_decay: on weights of two and more dimensions; none on biases and normalisation.
        warmup: share of the steps in which the rate rises linearly.
        floor: share of the peak at which the cosine ends (BigNAS's constant ending is 0.05).
        clip: largest Euclidean norm of the whole gradient; 0 for none.
        precision: `float32`, or `bfloat16` for autocast.
        seed: of weights, order, augmentation and sampling.
    """

    steps: int = 1000
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.05
    floor: float = 0.0
    clip: float = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}.")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must be in [0, 1], got {getattr(self, name)}.")
        check_literals(type(self), vars(self))

    def rate(self, step: int, steps: int | None = None) -> float:
        """Linear warm-up, then a cosine down to the floor; a function of the step and the number of steps alone."""
        steps = steps or self.steps
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        turned = (step - rising) / max(1, steps - rising)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * turned)) / 2)


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
    distiller: Spec | None = spec("kdnas.distillers.sandwich:Sandwich")
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

    scorer: Spec = spec("kdnas.scorers.rdm:Rdm")
    searcher: Spec = spec("kdnas.searchers.evolution:Evolution")
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

    distiller: Spec = spec("kdnas.distillers.from_teacher:FromTeacher")
    recipe: Recipe = Recipe()
    weights: Literal["fresh", "inherited"] = "fresh"
    num_random: int = 1

    def __post_init__(self) -> None:
        check_literals(type(self), vars(self))


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


@final
@dataclass(frozen=True, kw_only=True)
class Prune:
    """Search for a student among the sub-networks of one network.

    Attributes:
        data: makes the Data.
        budget: of the student, met within 2 %.
        source: the network to begin with, with its weights: `teacher` (the teacher trained here), `checkpoint:FOLDER`,
            or as in `kdnas.jobs.convert.load_source`.
        teacher: makes the teacher; None trains one in the run.
        penalty: of the factors, lambda; None to let it grow until the budget is met.
        by_cost: whether what a channel costs weighs its penalty.
        recipe: of the training with factors.
        teacher_recipe: of a teacher trained in the run.
        retrain: of the student, from its inherited weights, and of its controls.
    """

    data: Spec
    budget: Budget
    source: str = "teacher"
    teacher: Spec | None = None
    penalty: float | None = None
    by_cost: bool = True
    recipe: Recipe = Recipe(steps=400, learning_rate=0.02)
    teacher_recipe: Recipe = Recipe()
    retrain: Retrain = field(default_factory=lambda: Retrain(weights="inherited", recipe=Recipe(learning_rate=0.05)))

    def __post_init__(self) -> None:
        self.budget.only(COUNTS, "a pruning")
        if self.penalty is not None and not self.penalty >= 0:
            raise ValueError(f"penalty must not be negative, got {self.penalty}.")
        if self.source == "teacher" and self.teacher is not None:
            raise ValueError("the source `teacher` is the one trained here. Name a source, or leave the teacher out.")

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a pruning to be resumed."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"prune": unstructure(held)}


Generator = Literal["simple", "dynamic", "random"]
Teaches = Literal["ensemble", "last", "none"]


@final
@dataclass(frozen=True, kw_only=True)
class Grow:
    """The growth of an ensemble.

    Attributes:
        space: where members come from; its classes and channels are taken from the data.
        data: makes the Data.
        recipe: of every candidate; member `k` uses the seed `recipe.seed + k`.
        num_members: subnets of the finished ensemble; fewer where no further one is within the budget.
        generator: who is tried next: `simple` the first architecture again, `dynamic` the last member's made deeper and
            made wider, `random` draws.
        num_candidates: draws per member, for `random`.
        architecture: code of the first member; empty for the space's smallest network.
        teacher: of a candidate: `ensemble` so far (adaptive distillation), the `last` member (born again), or `none`.
        mixture: weights of the members: `uniform`, or `learned` on the search part with the members frozen.
        label_smoothing: of the cross-entropy with the labels.
        budget: of the whole ensemble.
        controls: also train an equally costly single network, the same members without a teacher, and an ensemble
            grown from random candidates.
    """

    space: SearchSpace
    data: Spec
    recipe: Recipe = Recipe()
    num_members: int = 3
    generator: Generator = "dynamic"
    num_candidates: int = 2
    architecture: str = ""
    teacher: Teaches = "ensemble"
    mixture: Literal["uniform", "learned"] = "uniform"
    label_smoothing: float = 0.1
    budget: Budget = Budget()
    controls: bool = True

    def __post_init__(self) -> None:
        for name in ("num_members", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_literals(type(self), vars(self))
        self.budget.only(COUNTS, "a growing ensemble")
        if self.architecture:
            self.space.parse(self.architecture)

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a growth to be resumed."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"grow": unstructure(held | {"space": table_of(self.space)})}


_MARK = "SYSTEM"


@final
@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is compared, and on what.

    Attributes:
        data: makes the Data.
        space: the search space of all systems.
        teacher: of all systems; None trains one first.
        systems: names from `systems()`; empty for all of them.
        budget: of every student.
        max_time: seconds for everything.
        seed: of every system.
    """

    data: Spec
    space: SearchSpace
    teacher: Spec | None = None
    systems: tuple[str, ...] = ()
    budget: Budget = Budget()
    max_time: float = 1200.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.max_time < math.inf:
            raise ValueError(f"max_time must be positive and finite, got {self.max_time}.")
        self.budget.only((*COUNTS, "memory"), "a comparison")
        known = systems()
        for name in self.systems:
            if name not in known:
                raise ValueError(f"no system is named {name!r}.{nearest(name, known)}")

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a comparison to be resumed."""
        teacher = None if self.teacher is None else self.teacher.to_json()
        held = {"data": self.data.to_json(), "space": table_of(self.space), "teacher": teacher, "seed": self.seed}
        held |= {"systems": list(self.systems), "budget": self.budget.bounds(), "max_time": self.max_time}
        return json.loads(json.dumps(unstructure(held)))


def systems() -> dict[str, str]:
    """What can be compared: experiments whose file says `SYSTEM = "what it does"`, found without running them."""
    found = {}
    for path in sorted(shared_folder("experiments").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [_MARK]:
                found[path.stem] = str(ast.literal_eval(node.value))
    return found
