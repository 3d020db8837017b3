"""Born-again networks: each generation is taught by the one before it."""

from collections.abc import Iterator
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.distillers.base import Batch, Distiller, Model, Schedule, Step
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.randomness import initialised, seed_of


@final
class BornAgain(Distiller):
    r"""`L_g = CE(z, y) + weight * KL(p_{g-1} || p) T^2`: generation g of a network is taught by generation g - 1.

    The training is cut into equal parts, one per generation. At the beginning of each the network so far becomes the
    teacher, frozen, and weights, optimiser and learning rate begin anew. Generation 0 learns from the labels, and
    with `taught` from the run's teacher too. The student is the last generation.

    Args:
        generations: parts of the training, at least 2.
        weight: of the divergence.
        temperature: T.
        taught: whether the teacher teaches generation 0.

    Raises:
        ValueError: fewer than 2 generations, a negative weight, or fewer steps than generations.

    Reference: Furlanello et al., Born Again Neural Networks, ICML 2018, section 3 (the variant with labels).
    Differs: the paper's ensemble of all generations is not made; `kdnas grow --teacher last` makes one.
    """

    model_type: ClassVar[type[Network]] = Network

    def __init__(
        self, *, generations: int = 3, weight: float = 1.0, temperature: float = 1.0, taught: bool = False
    ) -> None:
        super().__init__()
        if generations < 2:
            raise ValueError(f"generations must be at least 2, got {generations}. One is ordinary training.")
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}.")
        self.generations, self.weight, self.taught = generations, weight, taught
        self.divergence = SoftTargets(temperature=temperature)
        self.parent: nn.Module = nn.Identity()

    @property
    def uses_teacher(self) -> bool:
        """Only where it teaches generation 0."""
        return self.taught

    def prepare(self, model: Model, batch: Batch) -> None:
        """Make room for the generation before."""
        assert isinstance(model, Network)
        self.parent = initialised(lambda: Network(model.blueprint), 0).requires_grad_(False)

    def schedule(self, total: int) -> Schedule:
        """Optimizer and learning rate begin anew with each generation."""
        if total < self.generations:
            raise ValueError(f"{self.generations} generations need as many steps, got {total}.")
        begins = frozenset(total * g // self.generations for g in range(1, self.generations))
        return Schedule(total, restarts=begins, curves=begins)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The generation's loss; at its first step the network becomes its own teacher."""
        assert isinstance(model, Network)
        starts = self.schedule(step.total).restarts
        generation = sum(start <= step.index for start in starts)
        if step.index in starts:
            self.parent.load_state_dict(model.state_dict())
            fresh = initialised(lambda: Network(model.blueprint), seed_of(step.seed, "generation", generation))
            model.load_state_dict(fresh.state_dict())
        outputs = model(batch.images)
        loss = F.cross_entropy(outputs.logits.float(), batch.labels)
        if generation:
            self.parent.eval()  # a teacher's own statistics; the training loop sets the whole distiller to training
            loss = loss + self.weight * self.divergence(outputs, self.parent(batch.images).detach(), batch.labels)
        elif self.taught:
            loss = loss + self.weight * self.divergence(outputs, batch.teacher, batch.labels)
        yield f"generation {generation}", loss
