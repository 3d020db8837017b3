"""The base of losses: student first, teacher second, labels third; a scalar; float32 or better."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from kdnas.losses._inputs import (
    IGNORED,
    all_finite,
    as_outputs,
    check_agreement,
    check_labels,
    check_logits,
    check_moment,
    check_same_classes,
    check_widths,
    widths_of,
)
from kdnas.losses._options import recorded
from kdnas.losses.stage_pairs import Alignment, StagePairs
from kdnas.numerics import widen
from kdnas.outputs import START, Moment, Outputs
from kdnas.ranks.tensors import alone, gathered, sees_whole
from kdnas.specs import Spec


@dataclass(frozen=True)
class Stage:
    """One stage of a method's schedule.

    Attributes:
        name: the paper's name for it.
        share: its share of the training steps; the shares of a loss's stages sum to 1.
        trains: which parameters change: the student's, the loss's own parts, or both.
        uses: the objective: `loss` (this loss alone), `task` (the other terms alone), `both` (their sum), or
            `preparation` (`Loss.preparation`, a function of the teacher's outputs only).
        through: whether the loss needs the student's remaining layers in this stage (`Moment.remaining`).
    """

    name: str
    share: float
    trains: Literal["student", "parts", "both"] = "both"
    uses: Literal["loss", "task", "both", "preparation"] = "both"
    through: bool = False


class Loss(nn.Module, abc.ABC):
    """A distillation loss.

    Subclasses are `@final`, have keyword-only arguments, and implement `compute`. Every call runs in
    float32 (float64 stays float64) with autocast off, and the teacher's outputs are detached.

    What holds for every loss, because this class sees to it: NaN or infinity in what it reads of the student or the
    teacher gives NaN, with a gradient of NaN, and never a finite value. An empty batch gives 0 with a graph, as do
    labels that are all -100, where labels are read; a sample whose label is -100 is left out. Batches, devices and
    dtypes must agree.

    Class attributes:
        needs: its inputs: `logits`, `labels`, `features`, `attentions`, `images`.
        teacher_needs: what it reads of the teacher, where that is less than `needs`.
        ranges: the range of each numeric option, as an interval: `{"temperature": "(0, inf)"}`. NaN, infinities and
            values outside are refused; those of base classes apply too.
        uses_teacher: whether it depends on the teacher's outputs; not for a loss of the student and labels only.
        weight: the default weight in a sum, with its origin in the docstring.
        golden: the value on `kdnas.losses.example.example()` in float64, for `kdnas losses --check`.
        dense: it needs logits that are maps, `[batch, classes, height, width]`, of any two sizes; its example is dense.
        pairwise: a value over pairs of samples, which changes when the batch is repeated; the docstring explains why.
        whole_batch: its value on a batch is not the mean of its values on equal parts of it, since it compares samples
            or normalises by the batch. Several processes gather what it reads.
        own_gradient: the gradient is on purpose not that of the value (a surrogate, a detached target of the
            student's own); the docstring explains why, and the loss's own test checks the gradient.
        clipped: `Objective.teach` limits each parameter's gradient from this loss to the norm of its gradient from the
            other terms.
        discriminator_rates: names of the submodules that are discriminators, and their largest learning rate; it
            follows the training's schedule.

    Attributes:
        options: the constructor's arguments that are plain values, defaults included; `repr` shows them.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits",)
    teacher_needs: ClassVar[tuple[str, ...] | None] = None
    ranges: ClassVar[Mapping[str, str]] = {}
    uses_teacher: ClassVar[bool] = True
    weight: ClassVar[float] = 1.0
    golden: ClassVar[float | None] = None
    dense: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False
    whole_batch: ClassVar[bool] = False
    own_gradient: ClassVar[bool] = False
    clipped: ClassVar[bool] = False
    discriminator_rates: ClassVar[Mapping[str, float]] = {}
    options: Mapping[str, Any]
    _prepared: tuple[dict[str, int], dict[str, int]] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            setattr(cls, "__init__", recorded(vars(cls)["__init__"]))  # noqa: B010

    @recorded
    def __init__(self) -> None:
        # Not Module's, which accepts any argument: a Spec with an unknown one is then refused by name.
        super().__init__()
        if type(self).pretrain is not Loss.pretrain:
            self.register_buffer("trained", torch.zeros((), dtype=torch.bool))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Loss) and not isinstance(self, Wrapper):
            raise TypeError(
                f"{type(self).__name__} holds another loss: derive it from kdnas.losses.base.Wrapper, which passes "
                "everything on."
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Build the learnable parts, if any, from one batch of outputs.

        Called once, before the optimizer is built. Losses implement `build`.

        Args:
            student: outputs of the largest student on at least two images.
            teacher: the teacher's outputs on the same images.
            elastic: whether the student's widths differ from subnet to subnet.

        Raises:
            ValueError: outputs are missing or cannot be matched; the message names both shapes.
        """
        student, teacher = self._agreed(student, teacher)
        if any(not len(x) for _, x in student.select(self.needs)):
            raise ValueError(f"{type(self).__name__} is prepared with a batch of outputs, got an empty one.")
        self._prepared = None
        self.build(student, teacher, elastic=elastic)
        self._prepared = self._widths(student, teacher)

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build the learnable parts, if any; the outputs are checked, and float32 or float64.

        Args:
            student: outputs of the largest student.
            teacher: the teacher's outputs on the same images.
            elastic: whether the student's widths differ from subnet to subnet.

        Raises:
            ValueError: outputs cannot be matched; the message names both shapes.
        """

    @final
    def forward(
        self, student: Outputs | Tensor, teacher: Outputs | Tensor, labels: Tensor | None = None, at: Moment = START
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student: the student's outputs; where nothing else is read, the logits alone will do.
            teacher: the teacher's outputs, or logits; anything for a loss that does not use the teacher.
            labels: `[batch]`, or `[batch, height, width]`; not needed for losses that do not read them.
            at: where in the training.

        Raises:
            ValueError: inputs are missing or do not agree, or parts of the loss need a training first.
        """
        student, teacher = self._agreed(student, teacher)
        if self.whole_batch and sees_whole():
            with alone():
                return self.forward(*self._of_all(student, teacher, labels, at))
        if not self.is_trained:
            raise ValueError(
                f"{type(self).__name__} has parts that are trained before use, and they are not. Call loss.prepare"
                "(student, teacher), then take steps on loss.preparation(teacher) or load trained parts with "
                "load_state_dict; or call loss.mark_trained()."
            )
        with torch.autocast(student.logits.device.type, enabled=False):
            read = [x for _, x in student.select(self.needs)]
            if torch.compiler.is_compiling():
                labels = self._labels(student, labels)
                tensors = [*read, *self._read_of_teacher(teacher)]
                finite = torch.stack([x.isfinite().all() for x in tensors]).all()
                value = self.compute(student, teacher, labels, at)
                return value * torch.where(finite, 1.0, torch.nan)
            self._check_call(student, teacher, at)
            student, teacher, labels, at = self._counted(student, teacher, self._labels(student, labels), at)
            if not all(x.numel() for _, x in student.select(self.needs)):
                return connected_zero(*read)
            if not self._is_finite(student, teacher):
                return connected_zero(*read) * torch.nan
            return self.compute(student, teacher, labels, at)

    @abc.abstractmethod
    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The loss; the teacher is detached, everything is finite and float32 or float64, and the batch is not empty.

        What changes during a training, a decaying weight for example, follows from `at`; nothing is stored on the loss.
        Labels are class numbers; of logits `[batch, classes]`, samples of label -100 are left out beforehand.
        """

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the loss's schedule. Default: one, `joint`."""
        return (Stage("joint", 1.0),)

    @final
    def preparation(self, teacher: Outputs) -> Tensor:
        """The objective of the loss's own parts in a stage with `uses="preparation"`.

        Args:
            teacher: the teacher's outputs.

        Raises:
            ValueError: the loss has no such stage, or is not prepared.
        """
        if type(self).pretrain is Loss.pretrain:
            raise ValueError(f"{type(self).__name__} has no parts that are trained before use.")
        needs = self.teacher_needs or self.needs
        teacher = as_outputs(type(self).__name__, needs, teacher, "teacher").detach().map(widen)
        if self.whole_batch and sees_whole():
            with alone():
                return self.preparation(teacher.of(needs).map(gathered))
        with torch.autocast(teacher.logits.device.type, enabled=False):
            parts = [p for p in self.parameters() if p.requires_grad]
            if parts and not all(x.numel() for x in self._read_of_teacher(teacher)):
                return connected_zero(*parts)
            if parts and not all_finite(self._read_of_teacher(teacher)):
                return connected_zero(*parts) * torch.nan
            value = self.pretrain(teacher)
            self.mark_trained()
            return value

    def pretrain(self, teacher: Outputs) -> Tensor:
        """The objective of `preparation`; the teacher's outputs are detached and float32 or float64."""
        raise NotImplementedError

    @property
    def is_trained(self) -> bool:
        """Whether parts that need a training before use have had a step of it; True without such parts."""
        staged = any(stage.uses == "preparation" for stage in self.stages())
        return not staged or bool(self.trained)

    def mark_trained(self) -> None:
        """Say that the parts are trained, for weights from elsewhere."""
        if type(self).pretrain is not Loss.pretrain:
            self.trained.fill_(True)

    @final
    def adversary(
        self, student: Outputs | Tensor, teacher: Outputs | Tensor, labels: Tensor | None = None, at: Moment = START
    ) -> Tensor | None:
        """The discriminator's loss; None without a discriminator.

        The student's outputs are detached, so that its backward pass reaches the discriminator only; `compute` in turn
        runs the discriminator with detached weights (`frozen`), so that the student's does not reach it.
        """
        if type(self).discriminate is Loss.discriminate:
            return None
        student, teacher = self._agreed(student, teacher)
        if self.whole_batch and sees_whole():
            with alone():
                return self.adversary(*self._of_all(student, teacher, labels, at))
        self._check_call(student, teacher, at)
        with torch.autocast(student.logits.device.type, enabled=False):
            student, teacher, labels, at = self._counted(student.detach(), teacher, self._labels(student, labels), at)
            parts = [p for p in self.parameters() if p.requires_grad]
            if parts and not all(x.numel() for _, x in student.select(self.needs)):
                return connected_zero(*parts)
            if parts and not self._is_finite(student, teacher):
                return connected_zero(*parts) * torch.nan
            return self.discriminate(student, teacher, labels, at)

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor | None:
        """The discriminator's loss; both sides are detached and everything is float32 or float64."""
        return None

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ValueError unless the outputs are such as this loss compares."""
        name = type(self).__name__
        sides = (("student", student), ("teacher", teacher)) if self.uses_teacher else (("student", student),)
        if "logits" in self.needs or "labels" in self.needs:
            networks = sides if "logits" in self.needs else sides[:1]
            check_logits(name, {side: outputs.logits for side, outputs in networks}, dense=self.dense)
        if "logits" in self.needs and self.uses_teacher:
            for outputs in (teacher, *teacher.members):
                network = "teacher" if outputs is teacher else "teacher's member"
                check_same_classes(name, student.logits, outputs.logits, network, dense=self.dense)
        tensors = [(f"the student's {field}", x) for field, x in student.select(self.needs)]
        for side, outputs in [("the teacher", teacher), *(("a member", o) for o in teacher.members)]:
            tensors += [(f"{side}'s {field}", x) for field, x in self._teachers(outputs)]
        check_agreement(name, tensors)

    def _widths(self, student: Outputs, teacher: Outputs) -> tuple[dict[str, int], dict[str, int]]:
        theirs = self.teacher_needs or self.needs
        return widths_of(student, self.needs), widths_of(teacher, theirs) if self.uses_teacher else {}

    def _check_call(self, student: Outputs, teacher: Outputs, at: Moment) -> None:
        """Raise a ValueError unless moment, parts and prepared widths suit the outputs."""
        name = type(self).__name__
        read = [x for _, x in student.select(self.needs)] or [student.logits]
        check_moment(name, at, len(read[0]))
        if self._prepared is not None:
            for network, elastic, widths, prepared in zip(
                ("student", "teacher"), (True, False), self._widths(student, teacher), self._prepared, strict=True
            ):
                check_widths(name, network, widths, prepared, elastic=elastic)
        kinds = {(p.dtype, p.device) for p in self.parameters()}
        ours = next(((x.dtype, x.device) for _, x in student.select(self.needs)), None)
        if kinds and ours and ours not in kinds:
            (dtype, device), *_ = kinds
            raise ValueError(
                f"{type(self).__name__} has parts of {dtype} on {device}, but the outputs are {ours[0]} on {ours[1]}. "
                "Move the loss with .to(...)."
            )

    def _agreed(self, student: Outputs | Tensor, teacher: Outputs | Tensor) -> tuple[Outputs, Outputs]:
        """The outputs, checked and widened, the teacher's detached; the student's own where no teacher is used."""
        name = type(self).__name__
        ours = as_outputs(name, self.needs, student, "student").map(widen)
        theirs = as_outputs(name, self.teacher_needs or self.needs, teacher, "teacher") if self.uses_teacher else ours
        theirs = theirs.detach().map(widen)
        if not torch.compiler.is_compiling():
            self.check(ours, theirs)
        return ours, theirs

    def _of_all(
        self, student: Outputs, teacher: Outputs, labels: Tensor | None, at: Moment
    ) -> tuple[Outputs, Outputs, Tensor | None, Moment]:
        """What the loss reads, of the whole batch, of which several processes have parts."""
        student = student.of(self.needs).map(gathered)
        teacher = teacher.of(self.teacher_needs or self.needs).map(gathered) if self.uses_teacher else student
        ids = None if at.ids is None else gathered(at.ids)
        return student, teacher, None if labels is None else gathered(labels), replace(at, ids=ids)

    def _labels(self, student: Outputs, labels: Tensor | None) -> Tensor:
        if "labels" in self.needs:
            return check_labels(type(self).__name__, labels, student.logits)
        if labels is not None and not isinstance(labels, Tensor):
            raise ValueError(
                f"`labels` of {type(self).__name__} must be a tensor or None, got {type(labels).__name__}."
            )
        return torch.zeros(0, dtype=torch.int64) if labels is None else labels

    def _counted(
        self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment
    ) -> tuple[Outputs, Outputs, Tensor, Moment]:
        """Without the samples that are left out: all of a batch whose labels are all -100."""
        if "labels" not in self.needs:
            return student, teacher, labels, at
        counted = labels != IGNORED
        if bool(counted.all()) or (labels.dim() > 1 and bool(counted.any())):
            return student, teacher, labels, at
        counted = counted.flatten(1).any(1) if labels.dim() > 1 else counted
        student, teacher = (outputs.map(lambda x: x[counted]) for outputs in (student, teacher))
        return student, teacher, labels[counted], replace(at, ids=None if at.ids is None else at.ids[counted.cpu()])

    def _teachers(self, teacher: Outputs) -> list[tuple[str, Tensor]]:
        return list(teacher.select(self.teacher_needs or self.needs)) if self.uses_teacher else []

    def _read_of_teacher(self, teacher: Outputs) -> list[Tensor]:
        return [x for _, x in self._teachers(teacher)]

    def _is_finite(self, student: Outputs, teacher: Outputs) -> bool:
        return all_finite([*(x for _, x in student.select(self.needs)), *self._read_of_teacher(teacher)])

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if "trained" in self._buffers:  # checkpoints of before this was stored are of trained parts
            state_dict.setdefault(prefix + "trained", torch.ones((), dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


_OF_INNER = ("needs", "teacher_needs", "uses_teacher", "dense", "pairwise", "whole_batch", "own_gradient", "clipped")


class Wrapper(Loss):
    """A loss that holds another one: on changed outputs, or in other stages. Everything else is the inner loss's.

    Parts, discriminator, preparation, progress, schedule stages, `needs` and clipping are passed on. A subclass
    overrides `change`, or `stages`.

    Args:
        inner: the inner loss, or its Spec.

    Class attributes:
        option: the name of the option, and of the submodule, that is the inner loss.

    Raises:
        ValueError: `inner` is neither.
    """

    option: ClassVar[str] = "loss"

    def __init__(self, inner: Loss | Spec) -> None:
        super().__init__()
        inner = inner.build(Loss) if isinstance(inner, Spec) else inner
        if not isinstance(inner, Loss):
            raise ValueError(
                f"`{self.option}` must be a Loss or the Spec of a Loss, got {type(inner).__name__}. Write "
                f"{self.option}=spec(SoftTargets, temperature=2.0), for example."
            )
        setattr(self, self.option, inner)
        for name in _OF_INNER:
            setattr(self, name, getattr(inner, name))
        self.discriminator_rates = {  # type: ignore[misc]
            f"{self.option}.{name}": rate for name, rate in inner.discriminator_rates.items()
        }

    @property
    def inner(self) -> Loss:
        """The inner loss."""
        loss = getattr(self, self.option)
        assert isinstance(loss, Loss)
        return loss

    def change(self, outputs: Outputs) -> Outputs:
        """What the inner loss sees of a network's outputs; default: the same."""
        return outputs

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Prepare the inner loss."""
        self.inner.prepare(self.change(student), self.change(teacher), elastic=elastic)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The inner loss."""
        return self.inner.compute(self.change(student), self.change(teacher), labels, at)

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor | None:
        """The inner loss's discriminator's loss."""
        return self.inner.discriminate(self.change(student), self.change(teacher), labels, at)

    def stages(self) -> tuple[Stage, ...]:
        """The inner loss's."""
        return self.inner.stages()

    def pretrain(self, teacher: Outputs) -> Tensor:
        """The inner loss's preparation."""
        return self.inner.preparation(self.change(teacher))

    @property
    def is_trained(self) -> bool:
        """Whether the inner loss is."""
        return self.inner.is_trained

    def mark_trained(self) -> None:
        """Say that the inner loss's parts are trained."""
        self.inner.mark_trained()

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ValueError unless the outputs are such as the inner loss compares."""
        self.inner.check(student, teacher)


class FeatureLoss(Loss):
    """A loss between paired feature maps: the weighted sum of `between` over the pairs.

    Args:
        taps: the rule of pairing stages: `resolution` (default), `rdm`, `order`, `classified`, or explicit pairs
            `((student stage, teacher stage), ...)`; see `StagePairs`.
        weights: one weight per pair; default 1 each.

    Class attributes:
        alignment: what the formula needs of a pair: `nothing`, `positions` (equal height and width)
            or `channels` (equal channels too, by a learnable adapter on the student if they differ).
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    ranges: ClassVar[Mapping[str, str]] = {"weights": "[0, inf)"}
    alignment: ClassVar[Alignment] = "nothing"

    def __init__(
        self,
        *,
        taps: str | tuple[tuple[int, int], ...] = "resolution",
        weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.taps = StagePairs(pairs=taps, alignment=self.alignment)
        self.pair_weights = weights

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages and build the adapters."""
        self.taps.prepare(student, teacher, elastic)
        self._weights(len(self.taps.pairs))

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum of `between` over the paired maps."""
        pairs = self.taps(student, teacher)
        weights = self._weights(len(pairs))
        values = [w * self.between(s, t, i) for i, (w, (s, t)) in enumerate(zip(weights, pairs, strict=True))]
        return torch.stack(values).sum()

    def default_weights(self, num_pairs: int) -> tuple[float, ...]:
        """The weights of the pairs where `weights` is None: 1 each."""
        return (1.0,) * num_pairs

    def _weights(self, num_pairs: int) -> tuple[float, ...]:
        if self.pair_weights is not None and len(self.pair_weights) != num_pairs:
            raise ValueError(f"`weights` must be one per pair, for {num_pairs} pairs got {len(self.pair_weights)}.")
        return self.pair_weights or self.default_weights(num_pairs)

    @abc.abstractmethod
    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The loss of one pair of aligned features, a scalar; `pair` is its index."""


def connected_zero(*tensors: Tensor) -> Tensor:
    """Zero with a graph to every tensor: the value of a loss if there is nothing to compare."""
    return torch.stack([t.sum() * 0 for t in tensors]).nan_to_num(0.0, 0.0, 0.0).sum()


def frozen(part: nn.Module, *inputs: Any) -> Tensor:
    """The part's output with a graph to the inputs, not to its weights."""
    weights = {name: parameter.detach() for name, parameter in part.named_parameters()}
    return torch.func.functional_call(part, weights, inputs)
