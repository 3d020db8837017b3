"""A weighted sum of losses that reports its parts and keeps their schedules."""

from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from kdnas.losses.base import Loss, Stage, frozen
from kdnas.outputs import Outputs
from kdnas.spec import Spec


class Term(NamedTuple):
    """One term: a weight and what makes the loss."""

    weight: float
    loss: Spec


JOINT = Stage("joint", 1.0)


@final
class Objective(nn.Module):
    """`sum_k weight_k * loss_k(student, teacher, labels)`.

    Args:
        terms: pairs of weight and the Spec of a Loss. Names in logs are the losses' file names.
    """

    def __init__(self, terms: tuple[tuple[float, Spec], ...]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("an objective needs at least one term, (weight, loss).")
        self.weights = tuple(weight for weight, _ in terms)
        self.losses = nn.ModuleDict()
        for _, made in terms:
            name = made.make.partition(":")[0].rpartition(".")[2]
            while name in self.losses:
                name += "_again"
            self.losses[name] = made.build(Loss)

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Build every loss's learnable parts."""
        for loss in self.losses.values():
            assert isinstance(loss, Loss)
            loss.prepare(student, teacher, elastic=elastic)

    def forward(
        self, student: Outputs, teacher: Outputs, labels: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and each term unweighted and detached.

        While a staged loss uses itself alone, the others are left out; while it uses the task alone, it is; while it
        prepares its parts, the student learns nothing.

        Args:
            student: the student's outputs.
            teacher: the teacher's outputs.
            labels: `[batch]`.
            progress: the share of the training that is done; decides every staged loss's stage.
        """
        total, parts = torch.zeros((), device=student.logits.device), {}
        running = self.stages_at(progress)
        alone = [name for name, stage in running.items() if stage.uses in ("loss", "preparation")]
        for (name, loss), weight in zip(self.losses.items(), self.weights, strict=True):
            assert isinstance(loss, Loss)
            loss.progress = progress
            stage = running.get(name, JOINT)
            if (alone and name not in alone) or stage.uses == "task":
                continue
            if stage.uses == "preparation":
                value = loss.preparation(teacher)
            elif stage.trains == "student":
                value = frozen(loss, student, teacher, labels)
            else:
                value = loss(student.detach() if stage.trains == "parts" else student, teacher, labels)
            total = total + weight * value
            parts[name] = value.detach()
        return total, parts

    def stages_at(self, progress: float) -> dict[str, Stage]:
        """The stage every staged loss is in after this share of the training."""
        found = {}
        for name, loss in self.losses.items():
            assert isinstance(loss, Loss)
            stages = loss.stages()
            if stages != (JOINT,):
                found[name] = stages[-1]
                passed = 0.0
                for stage in stages:
                    passed += stage.share
                    if progress < passed - 1e-9:
                        found[name] = stage
                        break
        return found

    def restarts(self, total: int) -> frozenset[int]:
        """The steps at which a new stage begins, and the optimiser's momentum with it."""
        found = set()
        for loss in self.losses.values():
            assert isinstance(loss, Loss)
            passed = 0.0
            for stage in loss.stages()[:-1]:
                passed += stage.share
                found.add(round(passed * total))
        return frozenset(found)

    def adversaries(self, student: Outputs, teacher: Outputs, labels: Tensor) -> list[tuple[str, Tensor]]:
        """What the discriminators of the losses minimise, by name."""
        found = []
        for name, loss in self.losses.items():
            assert isinstance(loss, Loss)
            value = loss.adversary(student, teacher, labels)
            if value is not None:
                found.append((f"{name}_discriminator", value))
        return found
