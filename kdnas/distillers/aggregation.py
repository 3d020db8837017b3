"""DFA: search in which shares the teacher's layers form a stage's hint, then distil with these shares."""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.distillers.base import Batch, Distiller, Model, Schedule, Step
from kdnas.losses.base import connected_zero
from kdnas.losses.feature.aggregation import Aggregation as AggregatedHint
from kdnas.losses.feature.aggregation import Groups
from kdnas.network import Network, batch_statistics
from kdnas.outputs import Moment, Outputs
from kdnas.randomness import initialised


@final
class Aggregation(Distiller):
    r"""Differentiable feature aggregation: a hint per stage that mixes the teacher's layers there, in searched shares.

    The teacher's features are those of every layer; layers of equal size are a group $i$, with
    $A_i = \sum_j \alpha_{ij} T_{ij}$, $\alpha_i = \mathrm{softmax}(\beta_i)$, uniform at first. Connectors are 1x1
    convolutions, $F_s$ to the teacher's channels, $F_t$ to the student's.

    1. Search, the first `search_share` of the steps. The bridge loss
       $L = \sum_i \gamma_{ST} \overline{|F_s(S_i) - A_i|^2} + \gamma_{TS}\,\mathrm{CE}(\mathrm{rest}(i, F_t(A_i)), y)$,
       where $\mathrm{rest}$ is the student's layers after stage $i$, is minimised on two parts of every batch in
       turn: over the weights (student, connectors) on images of even numbers, then over $\beta$ on images of odd
       numbers with the weights as they are, plus $\frac12$ `decay` $|\beta|^2$. The weights never see the odd images,
       and the student's running statistics neither. $\beta$ follows Adam (0.5, 0.999) at its own `rate`.
    2. Distillation, in the remaining steps, on all images:
       $L = \mathrm{CE}(z_s, y) + \lambda \sum_i \overline{|F_s(S_i) - A_i|^2}$ with $\alpha$ fixed. The student begins
       anew, with initial weights by the training's seed (`anew`); the connectors are kept, the optimizer's momentum
       is not.

    The bar is the mean over all elements of a map, so the hint's unit is the teacher's own variance; CE is a mean over
    images. If a batch has no image of one part, that part's update is skipped.

    Args:
        groups: as in the loss `aggregation`: `resolution`, or `((student stage, (teacher layers, ...)), ...)`.
        search_share: share of the steps; 0 distils with equal shares, the control.
        student_to_teacher: $\gamma_{ST}$.
        teacher_to_student: $\gamma_{TS}$; at 0 the shares collapse to the layers the student matches already.
        weight: $\lambda$.
        rate: learning rate of $\beta$.
        decay: weight of $\beta$'s regulariser, R in the paper.
        anew: whether the student begins anew after the search, as in the paper.

    Raises:
        ValueError: a share outside [0, 1), a rate or weight that is negative, a teacher of several networks, or groups
            that do not fit.

    Reference: Guan et al., Differentiable Feature Aggregation Search for Knowledge Distillation, ECCV 2020, section 3;
        Liu et al., DARTS: Differentiable Architecture Search, ICLR 2019, section 2.3 (first-order alternation).
    Differs: the groups are searched at the same time, not one after the other; gradients to $\beta$ are of first
        order; squares are means. No code by the authors was found; rates, shares and weights are ours.
    """

    model_type: ClassVar[type[Network]] = Network
    every_layer: ClassVar[bool] = True

    def __init__(
        self,
        *,
        groups: str | Groups = "resolution",
        search_share: float = 1 / 3,
        student_to_teacher: float = 1.0,
        teacher_to_student: float = 1.0,
        weight: float = 1.0,
        rate: float = 0.01,
        decay: float = 1e-3,
        anew: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= search_share < 1:
            raise ValueError(f"`search_share` must be in [0, 1), got {search_share}. The default is a third.")
        for name, value in (("weight", weight), ("rate", rate), ("decay", decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")
        self.hint = AggregatedHint(
            groups=groups,
            student_to_teacher=student_to_teacher,
            teacher_to_student=teacher_to_student,
            staged=False,
        )
        self.search_share, self.weight, self.rate, self.decay, self.anew = search_share, weight, rate, decay, anew
        self.moments: Tensor
        self.updates: Tensor

    def prepare(self, model: Model, batch: Batch) -> None:
        """Group the teacher's layers; build shares, connectors and Adam's moments."""
        assert isinstance(model, Network)
        self.hint.prepare(model(batch.images), batch.teacher)
        # Not for the training loop's optimizer, which uses the weights' images.
        self.hint.betas.requires_grad_(False)
        count = sum(beta.numel() for beta in self.hint.betas)
        self.register_buffer("moments", torch.zeros(2, count, device=batch.images.device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long, device=batch.images.device))

    def alpha(self) -> tuple[Tensor, ...]:
        """The shares of each group; each sums to 1."""
        return self.hint.alpha()

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The bridge loss on the weights' images, later the label and the hint on all."""
        assert isinstance(model, Network)
        if step.index < self._switch(step.total):
            own = batch.ids.to(batch.images.device) % 2 == 0
            if own.any():
                student = model(batch.images[own])
                at = _moment(model, student, step, batch.ids[own.cpu()])
                yield "bridge", self.hint(student, _rows(batch.teacher, own), batch.labels[own], at)
            else:
                yield "bridge", connected_zero(*model.parameters())
            return
        if self.anew and step.index == self._switch(step.total) > 0:
            fresh = initialised(lambda: Network(model.blueprint), step.seed)
            model.load_state_dict(fresh.state_dict())
        student = model(batch.images)
        task = batch.task.loss(student.logits.float(), batch.labels)
        hint = self.hint(student, batch.teacher, batch.labels, Moment(step.progress, ids=batch.ids))
        yield "student", task + self.weight * hint

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """Update the shares on the images that the weights do not see."""
        assert isinstance(model, Network)
        other = batch.ids.to(batch.images.device) % 2 == 1
        if step.index >= self._switch(step.total) or not other.any():
            return
        with batch_statistics(model):
            with torch.no_grad():
                student = model(batch.images[other])
            at = _moment(model, student, step, batch.ids[other.cpu()])
            self.hint.betas.requires_grad_(True)
            bridge = self.hint(student, _rows(batch.teacher, other), batch.labels[other], at)
            regulariser = torch.stack([beta.square().sum() for beta in self.hint.betas]).sum()
            gradients = torch.autograd.grad(bridge + self.decay / 2 * regulariser, list(self.hint.betas))
            self.hint.betas.requires_grad_(False)
        self._update(torch.cat(gradients))

    def schedule(self, total: int) -> Schedule:
        """The optimizer restarts where the distillation begins."""
        return Schedule(total, frozenset({self._switch(total)} - {0}))

    def _switch(self, total: int) -> int:
        return round(self.search_share * total)

    @torch.no_grad()
    def _update(self, gradient: Tensor) -> None:
        """One step of Adam on all shares."""
        self.updates += 1
        first, second = self.moments
        first.lerp_(gradient, 1 - 0.5)
        second.lerp_(gradient.square(), 1 - 0.999)
        mean, variance = first / (1 - 0.5**self.updates), second / (1 - 0.999**self.updates)
        step = self.rate * mean / (variance.sqrt() + 1e-8)
        for beta, change in zip(self.hint.betas, step.split([b.numel() for b in self.hint.betas]), strict=True):
            beta -= change


def _moment(model: Network, student: Outputs, step: Step, ids: Tensor) -> Moment:
    """The moment of a loss that runs the student's remaining layers."""
    return Moment(step.progress, partial(model.remaining_layers, outputs=student.features), ids)


def _rows(outputs: Outputs, mask: Tensor) -> Outputs:
    return outputs.map(lambda tensor: tensor[mask])
