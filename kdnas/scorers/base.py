"""Evidence, scores, the base classes of scorers, and the evaluation of many subnets with shared prefixes."""

import abc
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor, nn

from kdnas.architecture import Architecture
from kdnas.data.base import Data
from kdnas.network import Network, as_input, as_logits, batch_statistics, modes
from kdnas.outputs import Outputs
from kdnas.randomness import python_rng
from kdnas.space import Blueprint, SearchSpace
from kdnas.specs import Spec, find_spec
from kdnas.supernet import Supernet
from kdnas.tasks.base import Task
from kdnas.tasks.classification import CLASSIFICATION
from kdnas.teachers.base import Teacher
from kdnas.teachers.stages import as_feature, find_stages, recorded

_T = TypeVar("_T")


@runtime_checkable
class BlockRater(Protocol):
    """A distiller that rates blocks by what it learned: `kdnas.distillers.block_wise.BlockWise`."""

    def rate(self, student: Network, images: Tensor, teacher: Outputs) -> tuple[float, ...]:
        """How far each block of the student is from the teacher's; 0 is best."""
        ...


@final
@dataclass(frozen=True)
class Evidence:
    """Fixed images and the teacher's outputs on them: the same for every candidate.

    A value. Whatever scorers derive from it is cached; a changed copy (`dataclasses.replace`) has an empty cache.

    Attributes:
        pixels: `[batch, channels, height, width]` in [0, 1], from the search part.
        images: the same, normalised for students.
        labels: `[batch, ...]`, as the task has them.
        teacher: the teacher's outputs on these pixels, computed once.
        teacher_module: the teacher, for scorers that train.
        data: the data set, for scorers that train.
        seed: for scorers that draw random numbers.
        distiller: the distiller that trained the supernet, with its learnable parts, where it rates blocks.
        supernet: the candidates' supernet, for scorers that compare a student with other subnets.
    """

    pixels: Tensor
    images: Tensor
    labels: Tensor
    teacher: Outputs
    teacher_module: Teacher | None = None
    data: Data | None = None
    seed: int = 0
    distiller: BlockRater | None = None
    supernet: Supernet | None = None
    _cache: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """`compute()`, called once per evidence and key: for example, the teacher's side of a comparison."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @property
    def task(self) -> Task:
        """The data's."""
        return CLASSIFICATION if self.data is None else self.data.task

    def accuracy(self, logits: Tensor) -> float:
        """The task's measure of a student's logits on these images."""
        return float(self.task.quality(self.task.grades(logits, self.labels).float().mean(0)))

    def subnets(self, scorer: "Scorer") -> Supernet:
        """The supernet, for a scorer that compares with other subnets.

        Raises:
            ValueError: the evidence has no supernet.
        """
        if self.supernet is None:
            raise ValueError(
                f"{type(scorer).__name__} compares students with other subnets, but the evidence has no supernet."
            )
        return self.supernet


@final
class Score(NamedTuple):
    """A score, higher is better.

    Attributes:
        value: the score.
        parts: numbers that the score consists of, or that explain it, by name.
        share: of the whole evaluation that was run; below 1 where a search stopped it early.
    """

    value: float
    parts: dict[str, float]
    share: float = 1.0


class Scorer(abc.ABC):
    """Maps a student to a number, higher is better.

    Subclasses are `@final` and take plain keyword arguments. The student is an ordinary module that returns Outputs or
    logits: a subnet extracted from a supernet, or any other network.

    Attributes:
        reads_weights: whether the score depends on the student's weights. False for scorers that count, or that draw or
            train weights of their own; a search with such a scorer needs no trained supernet.
        resources: amounts of a resource, such as training steps, at which the intermediate scores and the final one are
            available, ascending. A search with a pruner may stop an evaluation at any of them.
    """

    reads_weights: bool = True
    resources: tuple[int, ...] = (1,)

    @abc.abstractmethod
    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score. Changes nothing of the student, and is independent of earlier calls."""

    def rungs(self, student: nn.Module, evidence: Evidence) -> Iterator[Score]:
        """Yields the score at each of the `resources`, computed lazily; the last equals `score`."""
        yield self.score(student, evidence)


class OutputScorer(Scorer):
    """A scorer that needs only the student's outputs on the evidence.

    Batch norm uses the statistics of the evidence itself, so that a layer's output depends on the layers before it
    alone, and `score_by_all` computes each prefix that several candidates share once.
    """

    def digest(self, stage: int, feature: Tensor, evidence: Evidence) -> Any:
        """What `judge` needs of a stage's feature map, computed once per prefix; by default the feature map."""
        del stage, evidence
        return feature

    @abc.abstractmethod
    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The score from the logits and every stage's digest."""

    @final
    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """Runs the student on the evidence, without a graph."""
        with torch.no_grad(), batch_statistics(student):
            outputs = outputs_of(student, evidence.images)
            digests = [self.digest(i, f, evidence) for i, f in enumerate(outputs.features)]
            return self.judge(outputs.logits, digests, evidence)


class CombinedScorer(Scorer):
    """A scorer made of other scorers' scores; members that are `OutputScorer`s share prefixes.

    Args:
        members: specs, or names as `kdnas list scorers` prints them; one text may join names by `+`.

    Raises:
        ValueError: no members, an unknown name, or several members with intermediate scores.
    """

    def __init__(self, members: Sequence[Spec | str] | str) -> None:
        listed = members.split("+") if isinstance(members, str) else members
        specs = [find_spec("kdnas.scorers", m) if isinstance(m, str) else m for m in listed]
        if not specs:
            raise ValueError("`members` must name at least one scorer, got none.")
        self.members: list[Scorer] = [m.build(Scorer) for m in specs]
        self.reads_weights = any(m.reads_weights for m in self.members)
        staged = [m for m in self.members if len(m.resources) > 1]
        if len(staged) > 1:
            raise ValueError(
                f"at most one of `members` may have several rungs, got {len(staged)}. Set num_rungs=1 for the others."
            )
        self.resources = staged[0].resources if staged else (1,)

    @abc.abstractmethod
    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """One student's score from its members' scores."""

    @final
    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """Combines the members' scores of one student."""
        return self.combine([member.score(student, evidence) for member in self.members], evidence)

    @final
    def rungs(self, student: nn.Module, evidence: Evidence) -> Iterator[Score]:
        """Combines each intermediate score of the member with several rungs with the scores of the others."""
        iterators = [m.rungs(student, evidence) if len(m.resources) > 1 else None for m in self.members]
        fixed = [None if s else m.score(student, evidence) for m, s in zip(self.members, iterators, strict=True)]
        for _ in self.resources:
            scores = [next(s) if s else f for s, f in zip(iterators, fixed, strict=True)]
            yield self.combine([score for score in scores if score is not None], evidence)

    @final
    def reference(self, evidence: Evidence, count: int) -> tuple[list[Architecture], list[list[Score]]]:
        """Distinct random architectures, drawn with the evidence's seed, and each member's scores of them.

        Raises:
            ValueError: the evidence has no supernet.
        """
        supernet = evidence.subnets(self)
        rng = python_rng(evidence.seed, "reference")
        sample = list(dict.fromkeys(supernet.space.sample(rng) for _ in range(count)))
        return sample, [score_all(supernet, sample, member, evidence) for member in self.members]


def outputs_of(student: nn.Module, images: Tensor) -> Outputs:
    """A student's own Outputs, or its logits and the feature maps of the stages detected in it.

    The stages of a module that returns logits only are the last feature map at each resolution, or four transformer
    blocks (`kdnas.teachers.base.find_stages`); none where no submodule returns feature maps or tokens.
    """
    outputs = student(images)
    if isinstance(outputs, Outputs):
        return outputs
    try:
        names = find_stages(student, images)
    except ValueError:
        return Outputs(outputs, images=images)
    with recorded(student, names, batch=len(images)) as maps:
        logits = student(images)
    features = (as_feature(student.get_submodule(name), maps[name], images.shape) for name in names)
    return Outputs(logits, tuple(feature for feature in features if feature is not None), images=images)


@final
@dataclass
class LayerCount:
    """Layers evaluated, and layers that evaluation without shared prefixes would have evaluated."""

    evaluated: int = 0
    one_by_one: int = 0

    def __str__(self) -> str:
        if not self.evaluated:
            return "no layer evaluations"
        share = self.one_by_one / self.evaluated
        return f"{self.evaluated:,} layer evaluations instead of {self.one_by_one:,} ({share:.1f} times fewer)"


def score_all(
    supernet: Supernet,
    architectures: Sequence[Architecture],
    scorer: Scorer,
    evidence: Evidence,
    layer_count: LayerCount | None = None,
) -> list[Score]:
    """The scores of subnets under one scorer, in their order; see `score_by_all`."""
    return score_by_all(supernet, architectures, [scorer], evidence, layer_count)[0]


def tree_order(space: SearchSpace, architectures: Sequence[Architecture]) -> list[int]:
    """Indices in the order in which `score_by_all` visits subnets: those with a common prefix side by side."""
    keys = [[str(step) for step in _path(space.blueprint(a))] for a in architectures]
    return sorted(range(len(keys)), key=keys.__getitem__)


def score_by_all(
    supernet: Supernet,
    architectures: Sequence[Architecture],
    scorers: Sequence[Scorer],
    evidence: Evidence,
    layer_count: LayerCount | None = None,
) -> list[list[Score]]:
    """The scores of subnets under several scorers, a list per scorer in the order of the architectures.

    For those that are `OutputScorer`s, members of combined scorers among them, subnets are visited depth first over
    their common prefixes and each prefix is run once for all of them; memory is one path of activations, the deepest
    network's, and of their digests. The numbers are those of one-by-one evaluation.

    Args:
        supernet: with the weights.
        architectures: of the subnets.
        scorers: of which output scorers share prefixes.
        evidence: common to all.
        layer_count: counter that layer evaluations are added to.
    """
    layer_count = layer_count if layer_count is not None else LayerCount()
    flat = [member for scorer in scorers for member in _members(scorer)]
    output_scorers = [scorer for scorer in flat if isinstance(scorer, OutputScorer)]
    shared_columns = (
        iter(_walked(supernet, architectures, output_scorers, evidence, layer_count)) if output_scorers else iter(())
    )
    others = [scorer for scorer in flat if not isinstance(scorer, OutputScorer)]
    separate: list[list[Score]] = [[] for _ in others]
    for architecture in architectures if others else ():
        student = supernet.extract(architecture)
        for scorer, column in zip(others, separate, strict=True):
            column.append(scorer.score(student, evidence))
            layers = len(list(supernet.space.blueprint(architecture).named_layers()))
            layer_count.evaluated += layers
            layer_count.one_by_one += layers
    separate_columns = iter(separate)
    columns = iter([next(shared_columns if isinstance(scorer, OutputScorer) else separate_columns) for scorer in flat])
    return [_joined(scorer, columns, evidence) for scorer in scorers]


def _members(scorer: Scorer) -> list[Scorer]:
    """The members of a combined scorer, recursively; else the scorer itself."""
    return (
        [m for member in scorer.members for m in _members(member)] if isinstance(scorer, CombinedScorer) else [scorer]
    )


def _joined(scorer: Scorer, columns: Iterator[list[Score]], evidence: Evidence) -> list[Score]:
    """A scorer's column of scores, combined from its members'; takes one column per scorer in `_members`."""
    if not isinstance(scorer, CombinedScorer):
        return next(columns)
    member_columns = [_joined(member, columns, evidence) for member in scorer.members]
    return [scorer.combine(scores, evidence) for scores in zip(*member_columns, strict=True)]


def _walked(
    supernet: Supernet,
    architectures: Sequence[Architecture],
    scorers: Sequence[OutputScorer],
    evidence: Evidence,
    layer_count: LayerCount,
) -> list[list[Score]]:
    blueprints = [supernet.space.blueprint(a) for a in architectures]
    paths = [_path(b) for b in blueprints]
    order = sorted(range(len(paths)), key=lambda i: [str(step) for step in paths[i]])
    scores: list[list[Score | None]] = [[None] * len(paths) for _ in scorers]
    walk: list[tuple[Any, Tensor, list[Any]]] = []  # one path: step, activation, digests of the stage it ends
    latest: list[Score] = []
    with modes(supernet), torch.no_grad():
        for index in order:
            path, blueprint = paths[index], blueprints[index]
            shared = 0
            while shared < min(len(walk), len(path)) and walk[shared][0] == path[shared]:
                shared += 1
            del walk[shared:]
            for step in path[shared:]:
                name, layer, stage = step
                if layer is None:
                    x = as_input(evidence.images, blueprint)
                else:
                    outputs = [x for (_, _, ends), x, _ in walk if ends is not None]
                    x = supernet.run(name, layer, *layer.inputs(walk[-1][1], outputs), batch_statistics=True)
                    layer_count.evaluated += 1
                digests = [] if stage is None else [s.digest(stage, x, evidence) for s in scorers]
                walk.append((step, x, digests))
            layer_count.one_by_one += len(path) - 1
            if shared != len(path) or not latest:  # else another spelling of the network just scored
                stages = [digests for step, _, digests in walk if step[2] is not None]
                logits = as_logits(walk[-1][1], evidence.images, blueprint)
                latest = [
                    scorer.judge(logits, [digests[i] for digests in stages], evidence)
                    for i, scorer in enumerate(scorers)
                ]
                del logits  # else it outlives its path
            for column, score in zip(scores, latest, strict=True):
                column[index] = score
    return [[score for score in column if score is not None] for column in scores]


def _path(blueprint: Blueprint) -> list[tuple[str, Any, int | None]]:
    """The input size, then each layer with its position and the stage that ends with it."""
    return [(f"image {blueprint.image}", None, None), *blueprint.steps()]
