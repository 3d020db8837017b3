"""Born-again networks: each generation is the teacher of the next."""

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor, nn

from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Schedule, Step
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.randomness import initialised, seed_of


@final
class BornAgain(Distiller):
    r"""`L_g = CE(z, y) + weight * KL(p_{g-1} || p) T^2`: generation g - 1 of a network is the teacher of generation g.

    The training has equal parts, one per generation. At the beginning of each the present network becomes the
    teacher, frozen, and weights, optimizer and learning rate begin anew. Generation 0 learns from the labels, and
    with `taught` from the run's teacher too. The student is the last generation.

    Args:
        generations: number of generations, at least 2.
        weight: weight of the divergence.
        temperature: T.
        taught: whether generation 0 learns from the run's teacher.

    Raises:
        ValueError: fewer than 2 generations, a negative weight, or fewer steps than generations.

    Reference: Furlanello et al., Born Again Neural Networks, ICML 2018, section 3 (the variant with labels).
    Differs: the paper's ensemble of all generations is left out; `kdnas grow --teacher last` builds one.
    """

    model_type: ClassVar[type[Network]] = Network
    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self, *, generations: int = 3, weight: float = 1.0, temperature: float = 1.0, taught: bool = False
    ) -> None:
        super().__init__()
        if generations < 2:
            raise ValueError(f"`generations` must be at least 2, got {generations}. 1 is ordinary training.")
        if weight < 0:
            raise ValueError(f"`weight` must not be negative, got {weight}.")
        self.generations, self.weight, self.taught = generations, weight, taught
        self.divergence = SoftTargets(temperature=temperature)
        self.parent: nn.Module = nn.Identity()

    @property
    def uses_teacher(self) -> bool:
        """Whether generation 0 does."""
        return self.taught

    def prepare(self, model: Model, batch: Batch) -> None:
        """Allocate the previous generation."""
        assert isinstance(model, Network)
        self.parent = initialised(lambda: Network(model.blueprint), 0).requires_grad_(False)

    def schedule(self, total: int) -> Schedule:
        """Optimizer and learning rate begin anew with each generation."""
        if total < self.generations:
            raise ValueError(f"{self.generations} generations need at least as many steps, got {total}.")
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
        loss = batch.task.loss(outputs.logits.float(), batch.labels)
        if generation:
            self.parent.eval()  # a teacher's own statistics; the training loop sets the whole distiller to training
            loss = loss + self.weight * self.divergence(outputs, self.parent(batch.images).detach(), batch.labels)
        elif self.taught:
            loss = loss + self.weight * self.divergence(outputs, batch.teacher, batch.labels)
        yield f"generation {generation}", loss
