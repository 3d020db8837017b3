"""Logits, feature maps and attention maps of a network, as losses see them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import Tensor


class Outputs(NamedTuple):
    """A network's outputs for a batch.

    Attributes:
        logits: `[batch, classes]`, or `[batch, classes, height, width]` for dense prediction.
        features: one feature map per stage, shallow to deep: `[batch, channels, height, width]` of a
            convolutional stage, `[batch, tokens, channels]` of a transformer's.
        attentions: one map per transformer layer, `[batch, heads, tokens, tokens]`, rows sum to 1;
            empty for a network without attention.
        images: the network's input, `[batch, channels, height, width]`, for losses that are conditioned on it.
        members: outputs of each network of an ensemble of teachers, for losses over several teachers; empty for one
            network. The fields above are the ensemble's own.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    images: Tensor | None = None
    members: tuple["Outputs", ...] = ()

    def detach(self) -> "Outputs":
        """The same values, detached from the autograd graph."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Outputs":
        """The outputs with `change` applied to every tensor."""
        return Outputs(
            change(self.logits),
            tuple(change(f) for f in self.features),
            tuple(change(a) for a in self.attentions),
            None if self.images is None else change(self.images),
            tuple(member.map(change) for member in self.members),
        )


@final
@dataclass(frozen=True)
class Moment:
    """Where in a training a teacher or a loss is called.

    Attributes:
        progress: the share of the training that is done, 0 to 1.
        remaining: the student's remaining layers: `remaining(stage, map)` gives the logits that the layers after a
            stage give for this map. Losses get it in the stages of their schedule that ask for it (`Stage.through`).
        ids: `[batch]`, the samples' indices in the train part; None outside a training.
    """

    progress: float = 0.0
    remaining: Callable[[int, Tensor], Tensor] | None = None
    ids: Tensor | None = None


START = Moment()
END = Moment(progress=1.0)


def embedding(outputs: Outputs) -> Tensor:
    """The deepest stage's feature map averaged over positions, `[batch, channels]`.

    Raises:
        ValueError: the outputs have no features.
    """
    if not outputs.features:
        raise ValueError("an embedding is the pooled last feature map; these outputs have no feature maps.")
    deepest = outputs.features[-1]
    return deepest.mean((2, 3)) if deepest.dim() == 4 else deepest.mean(1) if deepest.dim() == 3 else deepest
