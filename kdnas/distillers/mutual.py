"""Deep mutual learning: several networks learn together and from each other."""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Step
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.randomness import initialised, seed_of


@final
class Mutual(Distiller):
    r"""`L_k = CE(z_k, y) + weight / (K - 1) * sum_{j != k} KL(p_j || p_k)`, for each of K networks at once.

    The student is network 0; its peers have its architecture and weights of their own, are learnable parts of this
    distiller, and are discarded. The targets of each are the others' present outputs, without a graph; means are
    over the batch. No teacher is used.

    Args:
        num_peers: K - 1.
        weight: weight of the mean divergence from the peers.
        temperature: temperature of the divergence, which is scaled by its square.

    Raises:
        ValueError: no peers, or a negative weight.

    Reference: Zhang, Xiang, Hospedales, Lu, Deep Mutual Learning, CVPR 2018, equations 4 to 8.
    Differs: the networks step together from the same predictions, the paper updates them one after the other.
    """

    model_type: ClassVar[type[Network]] = Network
    parallel: ClassVar[Parallel] = "any"

    def __init__(self, *, num_peers: int = 1, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if num_peers < 1:
            raise ValueError(f"`num_peers` must be at least 1, got {num_peers}.")
        if weight < 0:
            raise ValueError(f"`weight` must not be negative, got {weight}.")
        self.num_peers, self.weight = num_peers, weight
        self.divergence = SoftTargets(temperature=temperature)
        self.peers = nn.ModuleList()

    @property
    def uses_teacher(self) -> bool:
        """No: the networks are each other's teachers."""
        return False

    def prepare(self, model: Model, batch: Batch) -> None:
        """Initialise the peers."""
        assert isinstance(model, Network)
        first = torch.initial_seed()
        for number in range(self.num_peers):
            self.peers.append(initialised(lambda: Network(model.blueprint), seed_of(first, "peer", number)))

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss per network, the student's first."""
        del step
        assert isinstance(model, Network)
        predictions = [network(batch.images) for network in (model, *self.peers)]
        targets = [outputs.detach() for outputs in predictions]
        for k, outputs in enumerate(predictions):
            others = [self.divergence(outputs, t, batch.labels) for j, t in enumerate(targets) if j != k]
            loss = batch.task.loss(outputs.logits.float(), batch.labels)
            loss = loss + self.weight * torch.stack(others).mean()
            yield ("student" if k == 0 else f"peer {k}"), loss
