"""Progressive shrinking: the largest network first, then elastic kernels, depths and widths, stage by stage."""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from kdnas.architecture import Architecture, Choice, Value
from kdnas.distillers.base import Batch, Model, ObjectiveDistiller, Parallel, Schedule, Step
from kdnas.losses.base import Loss
from kdnas.network import Network
from kdnas.outputs import Moment, Outputs
from kdnas.sharing import sort_channels
from kdnas.space import SearchSpace
from kdnas.specs import Spec, check_literals, spec
from kdnas.supernet import Supernet
from kdnas.values import Amount, Rate

# Epochs of the released code, warm-up included; the full network's are those of the paper.
STAGES = (
    ("full", 1, 180.0, 1),
    ("kernel", 0, 125.0, 1),
    ("depth", 2, 25.0, 2),
    ("depth", 0, 125.0, 2),
    ("width", 2, 25.0, 4),
    ("width", 0, 125.0, 4),
)
SOFT = spec("kdnas.losses.response.soft_targets:SoftTargets", form="soft_cross_entropy", temperature=1.0)
KINDS = ("kernel", "depth", "width")


class Phase(NamedTuple):
    """One stage of the schedule.

    Attributes:
        kind: `full`, or what becomes elastic: `kernel`, `depth` or `width`.
        options: number of a choice's largest options that may be sampled; 0 for all.
        share: share of the steps, relative to the others.
        paths: subnets per step.
    """

    kind: str
    options: int
    share: float
    paths: int


@final
class Progressive(ObjectiveDistiller):
    r"""Trains the largest network alone, then smaller and smaller ones, on its soft labels.

    In the first stage $L = \mathrm{CE}(\mathrm{largest}, \mathrm{labels})$ plus the teacher's terms. In every later one
    a step samples a few subnets uniformly from the options that are elastic by then, and
    $L = \sum_{paths} \mathrm{CE}(s, \mathrm{labels}) + \lambda \, \mathrm{soft}(s, t)$ with gradients summed; $t$
    are the logits of the largest network after the first stage, in evaluation mode, or the teacher's.
    A choice of neither kernel, depth nor input size is a width. The input size is sampled per step in all stages.
    Before each width stage the channels inside every block are sorted by importance
    (`kdnas.sharing.sort_channels`). The optimizer's momentum starts anew with every stage.

    Args:
        stages: the schedule, each stage a tuple of kind, options, share and paths (see `Phase`); `full` comes first.
        source: source of the subnets' soft labels, `largest` or `teacher`.
        soft: the loss between a subnet and that source.
        weight: $\lambda$.
        terms: pairs of weight and loss between the largest and the teacher in the first stage.
        label_smoothing: label smoothing of the cross-entropy.

    Raises:
        ValueError: an unknown kind or source, a first stage that is not `full`, a share that is not positive; at
            `prepare`, a space whose choices are operations and not sizes.

    Reference: Cai, Gan, Wang, Zhang, Han, Once-for-All: Train One Network and Specialize it for Efficient Deployment,
        ICLR 2020, section 3.3 and appendix B.
    Differs: one learning-rate schedule over all stages, where the paper starts a cosine per stage; the source is in
        evaluation mode and has its own input size, where the released code's is in training mode.
    """

    model_type: ClassVar[type[Supernet]] = Supernet
    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self,
        *,
        stages: tuple[tuple[str, int, float, int], ...] = STAGES,
        source: Literal["largest", "teacher"] = "largest",
        soft: Spec = SOFT,
        weight: Amount = 1.0,
        terms: tuple[tuple[float, Spec], ...] = (),
        label_smoothing: Rate = 0.0,
    ) -> None:
        super().__init__(terms, label_smoothing=label_smoothing)
        self.phases = tuple(Phase(*stage) for stage in stages)
        if not self.phases or self.phases[0].kind != "full":
            raise ValueError(f"`stages` must begin with kind full, got {stages[:1]}. Insert ('full', 1, share, 1).")
        for phase in self.phases[1:]:
            if phase.kind not in KINDS:
                raise ValueError(f"kinds in `stages` after the first must be one of {KINDS}, got {phase.kind!r}.")
        for phase in self.phases:
            if not phase.share > 0 or phase.paths < 1 or phase.options < 0:
                raise ValueError(f"`stages` need a positive share, 1 or more paths and 0 or more options, got {phase}.")
        check_literals(type(self), locals())
        task = spec("kdnas.losses.response.cross_entropy:CrossEntropy", label_smoothing=label_smoothing)
        self.task, self.soft, self.weight, self.source = task.build(Loss), soft.build(Loss), weight, source
        self.largest: Network | None = None

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher is the source of soft labels, or one of the losses uses it."""
        return self.source == "teacher" or super().uses_teacher

    def prepare(self, model: Model, batch: Batch) -> None:
        """Check the space, build the losses' parts, and allocate the largest network's copy."""
        assert isinstance(model, Supernet)
        for choice in model.space.choices:
            if any(isinstance(option, str) for option in choice.options):
                raise ValueError(
                    f"progressive shrinking needs choices of sizes, but {choice.name} has operations {choice.options}. "
                    "Use single_path or fair_paths."
                )
        largest = model(batch.images, model.space.largest)
        if self.source == "largest":
            self.largest = model.extract(model.space.largest).requires_grad_(False)
        self.soft.prepare(largest, largest if self.source == "largest" else batch.teacher, elastic=True)
        self.objective.prepare(largest, self.teacher_outputs(batch, largest))

    def schedule(self, total: int) -> Schedule:
        """The optimizer restarts where a stage begins, here or in a loss; options become elastic by stage."""
        restarts = frozenset(self.begins(total)[1:]) | self.objective.restarts(total)
        return Schedule(total, restarts, options=partial(self._options, total=total))

    def begins(self, total: int) -> tuple[int, ...]:
        """The first step of every stage."""
        whole, passed, begins = sum(phase.share for phase in self.phases), 0.0, []
        for phase in self.phases:
            begins.append(round(total * passed / whole))
            passed += phase.share
        return tuple(begins)

    def _options(self, choice: Choice, index: int, total: int) -> tuple[Value, ...]:
        """A choice's largest options, as many as are elastic at a step."""
        kind = kind_of(choice)
        if kind == "resolution":
            return choice.options
        past = [p for p, begin in zip(self.phases, self.begins(total), strict=True) if begin <= index]
        counts = [phase.options for phase in past if phase.kind == kind]
        return choice.options[-1:] if not counts else choice.options[-counts[-1] :]

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The largest's losses in the first stage, later one per sampled subnet."""
        assert isinstance(model, Supernet)
        begins = self.begins(step.total)
        place = max(i for i, begin in enumerate(begins) if begin <= step.index)
        if place > 0 and step.index == begins[place]:
            self._enter(model, place, step)
        paths = self._sample(model.space, step, self.phases[place].paths)
        if place == 0:
            student = model(batch.images, paths[0])
            yield from self.student_losses("largest", student, model, batch, step, paths[0])
            return
        target, at = self._target(batch), Moment(step.progress, ids=batch.ids)
        for path in paths:
            student = model(batch.images, path)
            loss = self.task(student, target, batch.labels, at)
            yield "path", loss + self.weight * self.soft(student, target, batch.labels, at)
            del student, loss  # the graph: one subnet's activations alive at a time

    def _enter(self, model: Supernet, place: int, step: Step) -> None:
        if place == 1 and self.largest is not None:
            self.largest.load_state_dict(model.extract(model.space.largest).state_dict())
        if self.phases[place].kind == "width":
            widths = (choice for choice in model.space.choices if kind_of(choice) == "width")
            options = {choice: self._options(choice, step.index - 1, step.total) for choice in widths}
            most = max(map(len, options.values()), default=1)
            nested = [
                model.space.decide(
                    lambda c, i=i: options[c][-min(i, len(options[c]))] if c in options else c.options[-1]
                )
                for i in range(2, most + 1)
            ]
            sort_channels(model, nested)

    def _sample(self, space: SearchSpace, step: Step, number: int) -> list[Architecture]:
        rng = step.rng("architectures")
        size: dict[str, Value] = {}

        def pick(choice: Choice) -> Value:
            if choice.name == "resolution":
                return size.setdefault(choice.name, rng.choice(choice.options))
            return rng.choice(self._options(choice, step.index, step.total))

        return [space.decide(pick) for _ in range(number)]

    def _target(self, batch: Batch) -> Outputs:
        if self.largest is None:
            return batch.teacher
        with torch.no_grad():
            return self.largest.eval()(batch.images)


def kind_of(choice: Choice) -> str:
    """`kernel`, `depth`, `resolution`, or `width` for every other size."""
    last = choice.name.rpartition(".")[2]
    return last if last in ("kernel", "depth", "resolution") else "width"
