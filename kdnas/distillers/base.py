"""What every distiller is: it yields the losses of a batch; the training loop takes the optimizer step."""

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from torch import Tensor, nn

from kdnas.architecture import Architecture, Choice, Value
from kdnas.data.base import Data
from kdnas.losses.base import Loss
from kdnas.losses.objective import Objective
from kdnas.losses.of_task import OfMaps, OfTask
from kdnas.network import Network
from kdnas.outputs import Moment, Outputs
from kdnas.randomness import python_rng
from kdnas.specs import Spec, spec
from kdnas.supernet import Supernet
from kdnas.tasks.base import HINTON, Task

Model = Supernet | Network
Parallel = Literal["no", "same", "any"]
Teaching = Callable[[Tensor, Tensor], Outputs]
"""Pixels and labels to a teacher's outputs: a teacher at one moment, or a cache of its outputs."""


@final
class Batch:
    """The images of one step.

    Attributes:
        pixels: augmented images in [0, 1], for the teacher.
        images: the same pixels, normalised, for the student.
        labels: `[batch, ...]`, as the task has them.
        ids: `[batch]`, the images' indices in the train part.
        task: what the labels are for.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, ids: Tensor, data: Data, teacher: Teaching | None) -> None:
        self.pixels, self.labels, self.ids, self.task = pixels, labels, ids, data.task
        self.images = data.normalise(pixels)
        self._teacher = teacher

    @cached_property
    def teacher(self) -> Outputs:
        """The teacher's outputs on these pixels, computed at the first access."""
        if self._teacher is None:
            raise ValueError("this distiller needs a teacher, got none. Pass a teacher, or distil from labels only.")
        return self._teacher(self.pixels, self.labels)


@final
@dataclass(frozen=True)
class Step:
    """A step of a training.

    Attributes:
        index: number of steps before this one.
        total: number of all steps.
        seed: seed of the training.
        rate: learning rate of the step.
        weigh: whether the share of every loss term is measured; see `Objective.teach`.
        process: number of the process, where each trains its own architectures; else 0.
    """

    index: int
    total: int
    seed: int
    rate: float = 0.0
    weigh: bool = False
    process: int = 0

    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1)."""
        return self.index / self.total

    def rng(self, purpose: str) -> Any:
        """A `random.Random` seeded by (seed, purpose, index), and by the number of a process after the first."""
        return python_rng(self.seed, purpose, self.index, *[self.process] * (self.process > 0))


def every_option(choice: Choice, index: int) -> tuple[Value, ...]:
    """All options of a choice, at every step."""
    del index
    return choice.options


@final
@dataclass(frozen=True)
class Schedule:
    """How a distiller divides a training.

    Attributes:
        total: steps in all.
        restarts: steps at which the optimizer forgets its momentum, because a schedule stage begins.
        curves: steps at which the learning rate's curve begins anew; without any, one curve spans the training.
        options: the options of a choice that a step, by its index, may train.
    """

    total: int
    restarts: frozenset[int] = frozenset()
    curves: frozenset[int] = frozenset()
    options: Callable[[Choice, int], tuple[Value, ...]] = every_option

    def curve(self, index: int) -> tuple[int, int]:
        """A step's index on its learning rate curve, and that curve's length."""
        begin = max((edge for edge in self.curves if edge <= index), default=0)
        end = min((edge for edge in self.curves if edge > index), default=self.total)
        return index - begin, end - begin


class Distiller(nn.Module, abc.ABC):
    """A training scheme: yields the losses of a batch, one subnet's at a time.

    Learnable parts are submodules: they are optimised and checkpointed with the model, and absent from the student.

    Class attributes:
        every_layer: whether it needs the teacher's output of every layer (`kdnas.teachers.base.every_layer`).
        model_type: the kind of model it trains, Supernet or Network; None for both.
        parallel: whether several processes may share its steps. `no`: one process only. `same`: every loss is the mean
            of its values on equal parts of the batch, or a function of such means by `kdnas.ranks.tensors.mean` and
            `gathered`; so is what it remembers. `any`: moreover the processes may train architectures of their own.
        reads_gradients: whether it reads the parameters' gradients between its losses.
        of_images: whether it needs logits of the whole image, `[batch, classes]`.
    """

    every_layer: ClassVar[bool] = False
    parallel: ClassVar[Parallel] = "no"
    reads_gradients: ClassVar[bool] = False
    of_images: ClassVar[bool] = False
    model_type: ClassVar[type[Supernet] | type[Network] | None] = None

    @property
    def is_separable(self) -> bool:
        """Whether each loss of a step trains parameters of its own, in the order of `parts`.

        Such losses may be spread over processes: `losses` then yields those for which `kdnas.ranks.tensors.mine` holds.
        """
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the losses of every step of a distiller that is separable; known after `prepare`."""
        return ()

    @final
    @classmethod
    def check_model_type(cls, model: type[nn.Module]) -> None:
        """Raise a ValueError unless it trains this kind of model."""
        if cls.model_type not in (None, model):
            own, other, usual = "a supernet", "a single network", "from_teacher or mutual"
            if cls.model_type is Network:
                own, other, usual = other, own, "sandwich or single_path"
            raise ValueError(f"{cls.__name__} trains {own}, but the model is {other}. Use {usual}, for example.")

    @final
    def check_answers(self, dense: bool) -> None:
        """Raise a ValueError where it, or one that it wraps, needs logits of the whole image and gets `dense` ones."""
        for part in self.modules():
            if dense and isinstance(part, Distiller) and part.of_images:
                usual = "from_teacher" if part.model_type is Network else "sandwich"
                raise ValueError(
                    f"the distiller {spec(type(part)).name} needs one answer for the whole image, these networks have "
                    f"one for every pixel. Use {usual}, for example."
                )

    @final
    def suit(self, task: Task) -> None:
        """Take the task's terms where none were named, and its losses in place of those of classes; before `prepare`.

        Other losses of logits see those of pixels alone, where some are of the whole image.

        Raises:
            ValueError: it needs logits of the whole image, and those of the task are of every pixel.
        """
        self.check_answers(task.dense)
        for part in list(self.modules()):
            if isinstance(part, ObjectiveDistiller) and part.by_task and task.distillation != HINTON:
                part.objective = Objective(task.distillation)
        for module in list(self.modules()):
            for name, part in list(module.named_children()):
                if isinstance(part, Loss):
                    other, inner = task.losses.get(type(part).__module__.rpartition(".")[2]), isinstance(module, Loss)
                    if other is not None:
                        module.register_module(name, other.build(Loss))
                    elif task.image_outputs and "logits" in part.needs and not inner and not _is_suited(part):
                        module.register_module(name, OfMaps(loss=part, image_outputs=task.image_outputs))

    @property
    def uses_teacher(self) -> bool:
        """Whether it uses the teacher's outputs; if not, a training needs no teacher."""
        return True

    @property
    def reads_attentions(self) -> bool:
        """Whether one of its losses reads attention maps: a teacher that must be asked for its own is."""
        return any("attentions" in part.needs for part in self.modules() if isinstance(part, Loss))

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build learnable parts from one batch; called once, before the optimizer is built."""

    @abc.abstractmethod
    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """Name and scalar of each loss; the loop runs backward on each as it comes, then takes one optimizer step.

        One subnet's activations are alive at a time. Code after the last yield runs before the optimizer step.
        """

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """Called after the optimizer step. Default: nothing."""

    def export_extras(self, model: Network, data: Data, folder: Path) -> dict[str, float]:
        """Write further files into the trained student's folder; returns what was measured. Default: nothing."""
        del model, data, folder
        return {}

    def schedule(self, total: int) -> Schedule:
        """How a training of `total` steps is divided; asked for after `prepare`. Default: not at all."""
        return Schedule(total)


def _is_suited(loss: Loss) -> bool:
    return isinstance(loss, OfMaps | OfTask)


class ObjectiveDistiller(Distiller):
    """A distiller whose students minimise an `Objective`. The teacher runs only if one of its losses uses it.

    Args:
        terms: pairs of weight and loss; None for those of the task (`Task.distillation`).
        label_smoothing: of a cross-entropy with the labels, a further term of weight 1; None for the terms alone.
    """

    def __init__(self, terms: tuple[tuple[float, Spec], ...] | None, *, label_smoothing: float | None = None) -> None:
        super().__init__()
        self.by_task = terms is None
        terms = HINTON if terms is None else terms
        self.labels_only = label_smoothing is not None and not terms
        if label_smoothing is not None:
            labels = spec("kdnas.losses.response.cross_entropy:CrossEntropy", label_smoothing=label_smoothing)
            terms = ((1.0, labels), *terms)
        self.objective = Objective(terms)

    @property
    def uses_teacher(self) -> bool:
        """Whether one of the losses does."""
        return self.objective.uses_teacher

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the losses' learnable parts for the network, or for every subnet from the largest."""
        elastic = isinstance(model, Supernet)
        if elastic and self.labels_only:
            return  # nothing to build, and a pass would move the running statistics
        student = model(batch.images, model.space.largest) if elastic else model(batch.images)
        self.objective.prepare(student, self.teacher_outputs(batch, student), elastic=elastic)

    def schedule(self, total: int) -> Schedule:
        """The optimizer restarts where a stage of one of the losses begins."""
        return Schedule(total, self.objective.restarts(total))

    def student_losses(
        self,
        name: str,
        student: Outputs,
        model: Model,
        batch: Batch,
        step: Step,
        architecture: Architecture | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The objective's losses of one student; see `Objective.teach`.

        Args:
            name: of their sum, in logs.
            student: the student's outputs on the batch, with their graph.
            model: what is trained.
            batch: the batch.
            step: the step.
            architecture: the student's, where the model is a supernet.
        """
        if isinstance(model, Network):
            remaining = partial(model.remaining_layers, outputs=student.features)
        else:
            assert architecture is not None
            remaining = partial(model.remaining_layers, outputs=student.features, architecture=architecture)
        yield from self.objective.teach(
            name,
            student,
            self.teacher_outputs(batch, student),
            batch.labels,
            Moment(step.progress, remaining, batch.ids),
            learner=model,
            weigh=step.weigh,
        )

    def teacher_outputs(self, batch: Batch, student: Outputs) -> Outputs:
        """The teacher's outputs; in their place the student's own where no loss reads them."""
        return batch.teacher if self.objective.uses_teacher else student.detach()
