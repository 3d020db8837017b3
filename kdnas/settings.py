"""What a person decides, as frozen values that `run.json` shows and any later command builds again."""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypedDict, final, get_args, get_type_hints

from kdnas.costs.budget import COUNTS, Budget
from kdnas.space import SearchSpace
from kdnas.specs import Spec, nearest, spec
from kdnas.tables import shared_folder, structure, unstructure
from kdnas.values import LATER, Amount, Count, Factor, Index, Rate, Sample, Seed, Share, Side, Size, check_fields, shown

PerProcess = Literal["nothing", "statistics", "architectures", "blocks"]
"""What each process of `torchrun` has for itself."""


Precision = Literal["float32", "bfloat16", "float16"]


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimizer settings of one training.

    Attributes:
        steps: number of optimizer steps.
        batch_size: images per step.
        optimizer: `sgd` (Nesterov momentum 0.9) or `adamw`.
        learning_rate: peak learning rate.
        weight_decay: weight decay of weights with two or more dimensions; biases and normalisation have none.
        warmup: share of the steps in which the learning rate rises linearly, 0 to 1.
        floor: learning rate at the end of the cosine, as a share of the peak, 0 to 1 (BigNAS ends at 0.05).
        clip: largest Euclidean norm of the whole gradient; 0 for no clipping.
        precision: `float32`, or `bfloat16` or `float16` for autocast; losses are scaled in float16.
        seed: random seed for initial weights, batch order, augmentation and sampling.
        per_process: what each process of `torchrun` has for itself: `nothing`, so that they compute what one would;
            `statistics`, of batch norm and of losses that compare samples; `architectures` and statistics; or `blocks`
            of block_wise, each with the whole batch.
        activations: `kept` for the backward pass, or `recomputed` there, which needs less memory and a second forward
            pass; results are the same bit for bit.
        execution: `eager`, or `compiled` layers (torch.compile) of student, supernet and teacher in the steps.

    Raises:
        ValueError: a number out of range, or recomputed activations of compiled layers.

    Example:
        >>> recipe = Recipe(steps=100, learning_rate=0.1, warmup=0.1)
        >>> [round(recipe.rate(step), 3) for step in (0, 9, 55, 99)]
        [0.01, 0.1, 0.05, 0.0]
    """

    steps: Count = 1000
    batch_size: Count = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Factor = 0.1
    weight_decay: Amount = 5e-4
    warmup: Share = 0.05
    floor: Share = 0.0
    clip: Amount = 5.0
    precision: Precision = "float32"
    seed: Seed = 0
    per_process: PerProcess = field(default="nothing", metadata=LATER)
    activations: Literal["kept", "recomputed"] = field(default="kept", metadata=LATER)
    execution: Literal["eager", "compiled"] = field(default="eager", metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.execution == "compiled" and self.activations == "recomputed":
            raise ValueError("`activations` must be kept where `execution` is compiled, got recomputed.")

    def rate(self, step: int, steps: int | None = None) -> float:
        """Linear warm-up, then a cosine down to the floor; a function of the step and the number of steps alone."""
        steps = steps or self.steps
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        turned = (step - rising) / max(1, steps - rising)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * turned)) / 2)


class RecipeOptions(TypedDict, total=False):
    """The fields of a Recipe as optional keyword arguments."""

    steps: int | None
    batch_size: int | None
    optimizer: Literal["sgd", "adamw"] | None
    learning_rate: float | None
    weight_decay: float | None
    warmup: float | None
    floor: float | None
    clip: float | None
    precision: Precision | None
    seed: int | None
    per_process: PerProcess | None
    activations: Literal["kept", "recomputed"] | None
    execution: Literal["eager", "compiled"] | None


@final
@dataclass(frozen=True, kw_only=True)
class FitTeacher:
    """Fit a teacher here: a ResNet whose size follows the images', trained on labels.

    Attributes:
        recipe: optimizer settings.
        members: number of teachers, trained with the seeds `recipe.seed`, `recipe.seed + 1`, ...; with more than one,
            the teacher is their `Ensemble`.
        snapshots: number of equally spaced snapshots of the training, the last one at its end; with more than one, the
            teacher is their `Route`.
        blocks: residual blocks per stage; 0 for one on images of up to 16 x 16 pixels and two on larger ones.
        width: channels of the first stage, doubled at each later one; None for 32 on images of up to 16 x 16 pixels and
            64 on larger ones.

    Raises:
        ValueError: a number out of range, or members and snapshots at once.

    Example:
        >>> FitTeacher(recipe=Recipe(steps=500), members=3).members
        3
    """

    recipe: Recipe = Recipe()
    members: Count = 1
    snapshots: Count = 1
    blocks: Side = 0
    width: Size | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.snapshots > self.recipe.steps:
            raise ValueError(
                f"`snapshots` must be from 1 to {self.recipe.steps} (`recipe.steps`), got {self.snapshots}."
            )
        if self.members > 1 and self.snapshots > 1:
            raise ValueError(
                f"`members` or `snapshots` must be 1, got {self.members} and {self.snapshots}: a teacher is "
                "an ensemble or a route."
            )


@final
@dataclass(frozen=True)
class NoTeacher:
    """No teacher: the labels alone."""


@final
@dataclass(frozen=True)
class CardTeacher:
    """The teacher that the student's card names."""


TeacherChoice = Spec | NoTeacher | CardTeacher
"""The teacher of a retraining."""


@final
@dataclass(frozen=True, kw_only=True)
class Train:
    """Supernet training under a teacher.

    Attributes:
        space: the search space; its classes and image channels are set to those of the data.
        data: makes the Data.
        teacher: makes the teacher, called with `classes` and `preprocessing`; or `FitTeacher`.
        distiller: how the supernet is trained; None trains no supernet, and the scorer must then need no supernet
            weights.
        recipe: optimizer settings of the supernet.
        teacher_views: number of fixed augmentations per image, whose teacher outputs are computed once and cached in
            the run; 0 runs the teacher at every step on new augmentations.
        cache_limit: largest size of that cache in gigabytes.
        cache_outputs: what is cached: all outputs, or `top_logits`, at most 300 bytes per image, for losses that read
            nothing else.
        weights: a safetensors file with the supernet's initial weights, as `kdnas convert` writes it; "" for random
            weights.
        share: makes the supernet's sharing rule, such as `KernelTransform`; None is the leading corner.
        rollback: whether the supernet returns to its last healthy weights, once, when its accuracy collapses.
    """

    space: SearchSpace
    data: Spec
    teacher: Spec | FitTeacher = FitTeacher()
    distiller: Spec | None = spec("kdnas.distillers.sandwich:Sandwich")
    recipe: Recipe = Recipe()
    share: Spec | None = None
    rollback: bool = False
    teacher_views: Index = 0
    cache_limit: Factor = 4.0
    cache_outputs: Literal["all", "top_logits"] = field(default="all", metadata=LATER)
    weights: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_specs(self)


SCORER = spec(
    "kdnas.scorers.rank_ensemble:RankEnsemble",
    members=(spec("kdnas.scorers.in_place:InPlace", scorer="loss"), "nwot"),
    num_reference=100,
)
"""The mean of a subnet's ranks by KL divergence from the largest subnet and by nwot; docs/ranking.md says why."""


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """Ranking of subnets.

    Attributes:
        scorer: rates a subnet; higher is better.
        searcher: proposes candidates; built with `space`, `admits` and `rng`.
        budget: upper bounds on each candidate's costs.
        num_evaluations: number of distinct candidates to score.
        max_time: seconds, in equal parts for the search and each of its controls.
        num_images: images of the search part on which candidates are scored.
        control: also run random search with as many evaluations as the search did.
        contrast: a second scorer, under which the same searcher runs again with as many evaluations; the difference of
            the two rankings is recorded. None for no second search.
        pruner: makes an Optuna pruner, which may stop an evaluation early where the scorer reports intermediate scores;
            None evaluates every candidate in full.
        initial: number of best candidates of the run's previous search that are scored first and start this one.
        exact: for a run trained block-wise, rate every option of every block once and compute the best networks exactly
            instead of using `scorer` and `searcher`; `max_time` then bounds the controls only.
        seed: random seed of the searcher.
    """

    scorer: Spec = SCORER
    searcher: Spec = spec("kdnas.searchers.evolution:Evolution")
    budget: Budget = Budget()
    num_evaluations: Count = 200
    max_time: Factor = 1e9
    num_images: Sample = 256
    control: bool = True
    contrast: Spec | None = None
    pruner: Spec | None = None
    initial: Index = 0
    exact: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        _check_specs(self)
        check_fields(self)
        if self.initial > self.num_evaluations:
            raise ValueError(
                f"`initial` must be at most {self.num_evaluations} (`num_evaluations`), got {self.initial}."
            )
        if self.exact:
            self.budget.only(COUNTS, "an exact search", shares=True)


@final
@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Training of an exported student.

    Attributes:
        distiller: how the student is trained: `FromTeacher`, or `FromLabels` without a teacher.
        recipe: optimizer settings.
        weights: initial weights: `fresh` (random), or `inherited` from the supernet.
    """

    distiller: Spec = spec("kdnas.distillers.from_teacher:FromTeacher")
    recipe: Recipe = Recipe()
    weights: Literal["fresh", "inherited"] = "fresh"

    def __post_init__(self) -> None:
        _check_specs(self)
        check_fields(self)


Control = Literal["labels", "random", "largest", "longer", "contrast"]


@final
@dataclass(frozen=True, kw_only=True)
class Finals:
    """Which networks of a ranking are trained, and beside which controls; the best on the search part is the student.

    Attributes:
        finalists: number of the best networks, apart in their choices, that are trained.
        distance: two finalists differ in at least this share of their choices.
        largest: whether the last of three or more finalists is the largest network within the budget, in place of
            the next of the ranking.
        pruner: makes the Optuna pruner that stops finalists after a half of their steps, or after a quarter too where
            there are four or more.
        max_time: seconds for the finalists' trainings; there are fewer finalists where it is too short for all.
        seeds: number of seeds with which the student and the network of each control are trained.
        controls: `labels`, the student without a teacher; `random`, the best of as many random networks within the
            budget, trained and chosen alike; `largest`, the largest network within the budget; `longer`, place 1 for as
            many steps as all finalists had; `contrast`, the best of the search under the other score, if there was one.
    """

    finalists: Count = 3
    distance: Share = 0.2
    largest: bool = field(default=True, metadata=LATER)
    pruner: Spec = spec("optuna.pruners:SuccessiveHalvingPruner")
    max_time: Factor = 1e9
    seeds: Count = 1
    controls: tuple[Control, ...] = ("labels", "contrast")

    def __post_init__(self) -> None:
        _check_specs(self)
        check_fields(self)

    @property
    def trainings(self) -> tuple[float, float]:
        """Whole trainings that the finalists cost, and those of the further seeds and the controls.

        Example:
            >>> Finals(finalists=3, controls=("labels",)).trainings
            (2.0, 1.0)
        """
        whole = contest_cost(self.finalists)
        first = {"random": whole - 1, "longer": (whole - 1) * self.seeds, "contrast": -float(self.seeds)}
        return whole, self.seeds - 1 + sum(self.seeds + first.get(name, 0.0) for name in self.controls)


def contest_cost(count: int, shares: tuple[float, ...] | None = None) -> float:
    """Whole trainings that so many networks cost together where half of them, rounded down, go on from each share.

    Args:
        count: of networks.
        shares: of the steps, ascending, at which some are stopped, and 1; by default as many as the count needs.

    Example:
        >>> [contest_cost(count) for count in (1, 2, 3, 4, 8)]
        [1.0, 1.5, 2.0, 2.0, 4.0]
    """
    total, before = 0.0, 0.0
    for share in shares or SHARES[-rungs(count) :]:
        total += count * (share - before)
        before, count = share, max(1, count // 2)
    return total


SHARES = (0.25, 0.5, 1.0)
"""Shares of its steps after which every training of a finalist or control is measured."""


def rungs(count: int) -> int:
    """How many of `SHARES`, the last ones, so many finalists are compared at."""
    return min(len(SHARES), count.bit_length())


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The whole chain: train, search, export, retrain.

    Attributes:
        train: the supernet's training, and the teacher's.
        search: the ranking of subnets.
        retrain: the training of each finalist, and of each control.
        finals: which networks of the ranking are trained, and beside which controls.
        second: another search after `search`, which may start from its best candidates (`initial`); the best candidate
            of the last search is exported. None for one search.

    Example:
        >>> from kdnas.tables import load_space
        >>> train = Train(space=load_space("toy"), data=spec("kdnas.data:digits"), recipe=Recipe(steps=100))
        >>> experiment = Experiment(train=train, search=Search(budget=Budget(macs="60k")))
        >>> Experiment.from_json(experiment.to_json()) == experiment
        True
    """

    train: Train
    search: Search = field(default_factory=Search)
    retrain: Retrain = field(default_factory=Retrain)
    finals: Finals = field(default_factory=Finals)
    second: Search | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.search.initial:
            raise ValueError("`search.initial` must be 0: there is no earlier search to start from.")
        if self.train.distiller is None and self.retrain.weights == "inherited":
            raise ValueError("`retrain.weights` must be fresh where `train.distiller` is None: there is no supernet.")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal Experiment."""
        return {name: value for name, value in unstructure(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Experiment":
        """The Experiment that `to_json` wrote.

        Raises:
            ValueError: an unknown key or a wrong type.
        """
        retrain = {name: setting for name, setting in value.get("retrain", {}).items() if name != "num_random"}
        return structure({**value, "train": _current(value["train"]), "retrain": retrain}, cls)


def _current(train: Mapping[str, Any]) -> Mapping[str, Any]:
    """The training settings of a run in today's form; runs of version 0.1 held the teacher's beside them."""
    if "teacher_recipe" not in train:
        return train
    rest = dict(train)
    fit = {
        name.removeprefix("teacher_"): rest.pop(name)
        for name in train
        if name.startswith("teacher_") and name != "teacher_views"
    }
    return rest | {"teacher": fit if train["teacher"] is None else train["teacher"]}


Removal = Literal["shares", "scale_factors"]
InitialWeights = Literal["chosen", "inherited", "fresh"]
"""Initial weights of what a removal leaves: of the source, random, or of these what a trial chooses."""


@final
@dataclass(frozen=True, kw_only=True)
class Fit:
    """A teacher that is trained by itself, before any run.

    Attributes:
        data: makes the Data.
        network: `resnet`, or `torchvision:NAME` or `timm:NAME`, either with `@WEIGHTS`, a file to begin with.
        weights: `pretrained` (the zoo's, apart from the head) or `fresh`, where no file is named.
        size: height and width of a zoo's network's images; 0 for the zoo's.
        teacher: recipe, and of a `resnet` also blocks and width.
        losses: of a `resnet`, beside that of the labels: pairs of weight and loss, none of which uses a teacher.
    """

    data: Spec
    network: str = "resnet"
    weights: Literal["pretrained", "fresh"] = "pretrained"
    size: Side = 0
    teacher: FitTeacher = FitTeacher()
    losses: tuple[tuple[float, Spec], ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)
        zoo, colon, name = self.network.partition(":")
        if self.network != "resnet" and not (zoo in ("torchvision", "timm") and colon and name):
            raise ValueError(f"`network` must be resnet, torchvision:NAME or timm:NAME, got {self.network!r}.")
        of_resnet = (self.teacher.blocks, self.teacher.width) != (0, None)
        if (self.network == "resnet" and self.size) or (self.network != "resnet" and of_resnet):
            raise ValueError("`size` is for a zoo's network, `blocks` and `width` are for resnet. Drop one of the two.")
        if self.losses and self.network != "resnet":
            raise ValueError("`loss` is for resnet, whose stages it compares. Drop --loss or --network.")

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a fit to be resumed."""
        return {"fit": unstructure(self)}


@final
@dataclass(frozen=True, kw_only=True)
class Prune:
    """A student cut out of one network.

    Attributes:
        data: makes the Data.
        budget: upper bounds on the student's costs.
        source: the network to prune: `teacher` (the teacher's own), `checkpoint:FOLDER`, or as `kdnas convert` takes
            it.
        teacher: makes the teacher; or `FitTeacher`.
        method: `shares` searches how many channels each group keeps, and which blocks, under the source; nothing is
            trained. `scale_factors` trains a factor per channel and block under the teacher.
        num_candidates: of `shares`: number of removals that are tried.
        max_time: of `shares`: seconds in which they are tried; at least one is.
        num_images: of `shares`: images of the train part that layers are reconstructed on, and of the search part that
            candidates are scored on.
        finalists: of `shares`: number of the best removals, apart from each other, that are tried in short trainings.
        divisor: of `shares`: widths are multiples of it where the source's are larger; 0 for 8, and for 4 in
            groups below 64 channels, under a budget on latency, which is then measured on few different layers; else 1.
        controls: whether equal shares, random removal and the student without a teacher are trained whole too.
        penalty: weight of the scale factors' penalty; None increases it until the budget is met.
        rounds: in which a penalty that grows removes, with training in between.
        by_cost: whether each channel's penalty is weighted by its cost.
        as_published: of scale factors: whether groups of channels are compared by their factors as they are, and the
            weights trained with the factors are retrained. False: factors are relative to their group's, and only
            choose; what is left is fitted to the source and retrained as with `shares`.
        recipe: optimizer settings of the training with scale factors.
        retrain: optimizer settings of the student's training, and of its controls'.
        distiller: how the student is trained; None chooses the mixture of labels and teacher by trials of a tenth of
            the steps, compared on the search part.
        weights: its initial weights: `inherited` from the source, `fresh` (random), or `chosen` by such trials.
    """

    data: Spec
    budget: Budget
    source: str = "teacher"
    teacher: Spec | FitTeacher = FitTeacher()
    method: Removal = "shares"
    num_candidates: Count = 100
    max_time: Factor = field(default=1e9, metadata=LATER)
    num_images: Sample = 1000
    finalists: Count = 1
    divisor: Side = 0
    controls: bool = True
    penalty: Amount | None = None
    rounds: Count = 4
    by_cost: bool = False
    as_published: bool = False
    recipe: Recipe = Recipe(steps=400, learning_rate=0.02)
    retrain: Recipe = Recipe(learning_rate=0.05)
    distiller: Spec | None = None
    weights: InitialWeights = "chosen"

    def __post_init__(self) -> None:
        check_fields(self)
        self.budget.only((*COUNTS, "latency", "size") if self.method == "shares" else COUNTS, "a pruning", shares=True)

    @property
    def trainings(self) -> float:
        """Whole trainings that the trials, the student and its controls cost at most; a trial has a tenth of the steps.

        Example:
            >>> Prune(data=Spec("a:b"), budget=Budget(macs=1e6), controls=False).trainings
            1.6
        """
        removals = self.finalists + 2  # with equal shares and random channels
        trials = removals + 2 * (self.distiller is None) + (self.weights == "chosen")
        return round(0.1 * trials + 1 + 3 * self.controls, 1)

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a pruning to be resumed."""
        return {"prune": unstructure(self)}


Generator = Literal["simple", "dynamic", "random"]
CandidateTeacher = Literal["ensemble", "last", "none"]


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
    num_members: Count = 3
    generator: Generator = "dynamic"
    num_candidates: Count = 2
    architecture: str = ""
    teacher: CandidateTeacher = "ensemble"
    mixture: Literal["uniform", "learned"] = "uniform"
    label_smoothing: Rate = 0.1
    budget: Budget = Budget()
    controls: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.budget.only(COUNTS, "a growing ensemble")
        if self.architecture:
            self.space.parse(self.architecture)

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a growth to be resumed."""
        return {"grow": unstructure(self)}


def _check_specs(settings: Any) -> None:
    """Raise a ValueError where a field that takes a Spec or a space holds another thing, such as a name."""
    for name, kind in get_type_hints(type(settings)).items():
        kinds = get_args(kind) or (kind,)
        value = getattr(settings, name)
        if (Spec in kinds or SearchSpace in kinds) and not isinstance(value, kinds):
            known = " or ".join(k.__name__ for k in kinds if k is not type(None))
            how = "load_space" if SearchSpace in kinds else "spec"
            raise ValueError(f"`{name}` must be a {known}, got {value!r:.60}. Make one with kdnas.{how}.")


_MARK = "SYSTEM"


@final
@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is compared, and on what.

    Attributes:
        data: makes the Data.
        space: the search space of all systems.
        teacher: makes the teacher of all systems; or `FitTeacher`, whose steps are planned within `max_time`.
        systems: names from `systems()`; empty for all of them.
        budget: of every student.
        max_time: seconds for everything.
        seed: of every system.
    """

    data: Spec
    space: SearchSpace
    teacher: Spec | FitTeacher = FitTeacher()
    systems: tuple[str, ...] = ()
    budget: Budget = Budget()
    max_time: Factor = 1200.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        self.budget.only((*COUNTS, "memory"), "a comparison")
        known = systems()
        for name in self.systems:
            if name not in known:
                raise ValueError(f"no system is named {shown(name)}.{nearest(name, known)}")

    def to_json(self) -> dict[str, Any]:
        """What must be equal for a comparison to be resumed."""
        return unstructure(self) | {"budget": self.budget.bounds()}


@cache  # Python 3.11 cannot parse code in two threads at once
def systems() -> Mapping[str, str]:
    """The systems that can be compared: experiments whose file has a line `SYSTEM = "..."`; no file is run."""
    texts = {}
    for path in sorted(shared_folder("experiments").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [_MARK]:
                texts[path.stem] = str(ast.literal_eval(node.value))
    return MappingProxyType(texts)
