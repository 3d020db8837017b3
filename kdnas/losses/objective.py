"""A weighted sum of losses, with their values, schedules and discriminators."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from kdnas.losses.base import Loss, Stage, frozen
from kdnas.numerics import safe_norm
from kdnas.outputs import START, Moment, Outputs
from kdnas.ranks.tensors import averaged
from kdnas.specs import Spec, parse_spec


class Term(NamedTuple):
    """One term: a weight and a loss, as a Spec, an object, or its name with options."""

    weight: float
    loss: Spec | Loss | str


class Share(NamedTuple):
    """A term's part in one step: its weighted value, and its share of the gradient's norms, summed over the terms."""

    value: float
    gradient: float


JOINT = Stage("joint", 1.0)


@final
class Objective(nn.Module):
    """`sum_k weight_k * loss_k(student, teacher, labels)`.

    Attributes:
        shares: of the terms of the last step that was weighed, by name; empty before.

    Args:
        terms: pairs of weight and loss: a Spec, a Loss, or a name with options, `"soft_targets,temperature=2"`. A loss
            with a negative weight grows. Names in logs are the losses' file names.

    Raises:
        ValueError: no terms, something else than a pair, a weight that is not a finite number, or an unknown loss.
    """

    def __init__(self, terms: Sequence[tuple[float, Spec | Loss | str]]) -> None:
        super().__init__()
        if not isinstance(terms, Sequence) or isinstance(terms, str) or not terms:
            raise ValueError(f"`terms` of an objective must be at least one pair (weight, loss), got {terms!r}.")
        self.losses = nn.ModuleDict()
        weights = []
        for term in terms:
            weight, name, loss = _checked(term)
            while name in self.losses:
                name += "_again"
            self.losses[name] = loss
            weights.append(weight)
        self.weights = tuple(weights)
        self.shares: dict[str, Share] = {}

    @property
    def uses_teacher(self) -> bool:
        """Whether one of the losses uses the teacher's outputs."""
        return any(loss.uses_teacher for loss in self.losses.values() if isinstance(loss, Loss))

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Build every loss's learnable parts."""
        for loss in self.losses.values():
            assert isinstance(loss, Loss)
            loss.prepare(student, teacher, elastic=elastic)

    def forward(
        self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment = START
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and each term unweighted and detached.

        In a stage that uses `loss`, the other terms are left out; in one that uses `task`, the staged loss is; in a
        `preparation` the student does not learn.

        Args:
            student: the student's outputs.
            teacher: the teacher's outputs.
            labels: `[batch]`.
            at: where in the training; its progress decides every staged loss's stage.
        """
        total, parts = torch.zeros((), device=student.logits.device), {}
        for name, weight, value in self._terms(student, teacher, labels, at):
            total = total + weight * value
            parts[name] = value.detach()
        return total, parts

    def teach(
        self,
        name: str,
        student: Outputs,
        teacher: Outputs,
        labels: Tensor,
        at: Moment,
        *,
        learner: nn.Module,
        weigh: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """The losses that a distiller yields for one student, before all others of a step.

        First the sum. Then the losses that are `clipped`, one by one: if a parameter's gradient from such a loss is
        longer than that from the sum, it is scaled down to the latter's norm; where the sum has none, as in the loss's
        own parts, it is not. Last the discriminators' own losses, on detached outputs.

        Args:
            name: of the sum, in logs.
            student: the student's outputs, with their graph.
            teacher: the teacher's outputs.
            labels: `[batch]`.
            at: where in the training.
            learner: the student's module.
            weigh: also measure `shares`, which costs a backward pass per term; the losses are the same.
        """
        terms = {n: weight * value for n, weight, value in self._terms(student, teacher, labels, at)}
        clipped = [n for n, loss in self.losses.items() if isinstance(loss, Loss) and loss.clipped]
        apart = {n: term for n, term in terms.items() if n in clipped}
        if len(apart) == len(terms):
            apart = {}  # nothing to clip by
        parameters = [p for module in (learner, self) for p in module.parameters() if p.requires_grad]
        if weigh:
            self.shares = _shares(terms, [p for p in learner.parameters() if p.requires_grad])
        # Before the sum is yielded: its backward pass frees the graph that they share.
        gradients_of = {
            n: torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for n, t in apart.items()
        }
        yield name, torch.stack([term for n, term in terms.items() if n not in apart]).sum()
        for n, gradients in gradients_of.items():
            # A value whose gradient, added by the loop's backward pass, is the clipped one.
            carrier = torch.zeros((), device=student.logits.device)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    (whole,) = averaged([gradient])
                    carrier = carrier + (parameter * _clipped(whole, parameter.grad)).sum()
            yield n, apart[n].detach() + (carrier - carrier.detach())
        yield from self.adversaries(student.detach(), teacher, labels, at)

    def _terms(
        self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of every term that is part of the present stage."""
        stages = self.stages_at(at.progress)
        alone = [name for name, stage in stages.items() if stage.uses in ("loss", "preparation")]
        for (name, loss), weight in zip(self.losses.items(), self.weights, strict=True):
            assert isinstance(loss, Loss)
            stage = stages.get(name, JOINT)
            moment = at if stage.through else replace(at, remaining=None)
            if (alone and name not in alone) or stage.uses == "task":
                continue
            if stage.uses == "preparation":
                yield name, weight, loss.preparation(teacher)
            elif stage.trains == "student":
                yield name, weight, frozen(loss, student, teacher, labels, moment)
            else:
                outputs = student.detach() if stage.trains == "parts" else student
                yield name, weight, loss(outputs, teacher, labels, moment)

    def stages_at(self, progress: float) -> dict[str, Stage]:
        """The present stage of every loss with more than one, after this share of the training."""
        present = {}
        for name, loss in self.losses.items():
            assert isinstance(loss, Loss)
            stages = loss.stages()
            if stages != (JOINT,):
                present[name] = stages[-1]
                passed = 0.0
                for stage in stages:
                    passed += stage.share
                    if progress < passed - 1e-9:
                        present[name] = stage
                        break
        return present

    def restarts(self, total: int) -> frozenset[int]:
        """The steps at which a stage begins, and the optimizer's momentum anew."""
        steps = set()
        for loss in self.losses.values():
            assert isinstance(loss, Loss)
            passed = 0.0
            for stage in loss.stages()[:-1]:
                passed += stage.share
                steps.add(round(passed * total))
        return frozenset(steps)

    def adversaries(
        self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment = START
    ) -> list[tuple[str, Tensor]]:
        """The losses of the discriminators, by name."""
        values = []
        for name, loss in self.losses.items():
            assert isinstance(loss, Loss)
            value = loss.adversary(student, teacher, labels, replace(at, remaining=None))
            if value is not None:
                values.append((f"{name}_discriminator", value))
        return values


def _checked(term: Any) -> tuple[float, str, Loss]:
    """Weight, name and loss of one term."""
    if not isinstance(term, tuple | list) or len(term) != 2:
        raise ValueError(f"a term of an objective must be a pair (weight, loss), got {term!r}.")
    weight, loss = term
    if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
        raise ValueError(f"the weight of a term must be a finite number, got {weight!r} for {loss!r}.")
    if isinstance(loss, str):
        loss = parse_spec("kdnas.losses", loss)
    if isinstance(loss, Spec):
        return float(weight), loss.name, loss.build(Loss)
    if isinstance(loss, Loss):
        return float(weight), type(loss).__module__.rpartition(".")[2], loss
    raise ValueError(f"a term's loss must be a Spec, a Loss or its name, got {loss!r}. Write (1.0, 'soft_targets').")


def _shares(terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Share]:
    """The share of each term with a gradient; all 0 where no term has any."""
    norms = {}
    for name, term in terms.items():
        known = term.requires_grad and torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        gradients = [gradient for gradient in known or () if gradient is not None]
        norms[name] = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    total = sum(norms.values())
    return {n: Share(float(term.detach()), norms[n] / total if total else 0.0) for n, term in terms.items()}


def _clipped(gradient: Tensor, task: Tensor | None) -> Tensor:
    """The gradient, no longer than the task's where there is one; a gradient of 0 stays 0."""
    if task is None:
        return gradient
    own = safe_norm(gradient.flatten())
    return gradient * (safe_norm(task.flatten()) / torch.where(own > 0, own, 1.0)).clamp_max(1)
