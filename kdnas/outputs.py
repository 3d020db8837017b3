"""Logits, feature maps and attention maps of a network, as losses see them."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, final

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """A network's outputs for a batch.

    Attributes:
        logits: `[batch, classes]`, or `[batch, classes, height, width]` for dense prediction. Those of a language
            model, `[batch, tokens, classes]`, come in by `Outputs.of_tokens`.
        features: one feature map per stage, shallow to deep: `[batch, channels, height, width]` of a
            convolutional stage, `[batch, tokens, channels]` of a transformer's.
        attentions: one map per transformer layer, `[batch, heads, tokens, tokens]`, rows sum to 1;
            empty for a network without attention.
        images: the network's input, `[batch, channels, height, width]`, for losses that are conditioned on it.
        members: outputs of each network of an ensemble of teachers, for losses over several teachers; empty for one
            network. The other fields are the ensemble's own.
        classified: of dense prediction the map that the classifier of every position reads, after the head's own
            layers, `[batch, channels, height, width]` or tokens; it goes with the features. None where the last of
            them is that map, or nothing else is known.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    images: Tensor | None = None
    members: tuple["Outputs", ...] = ()
    classified: Tensor | None = None

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """The features, and behind them the map that is classified, where it is none of them."""
        return self.features if self.classified is None else (*self.features, self.classified)

    @classmethod
    def of_tokens(cls, logits: Tensor, *fields: Any, **others: Any) -> "Outputs":
        """The outputs of a network that classifies every token, a language model for example.

        Three dimensions do not say where the classes are, so losses refuse them; this says that they are last. The
        logits become a map with the tokens as its rows, `[batch, classes, tokens, 1]`: every loss of dense logits takes
        them, with labels `[batch, tokens]`, of which -100 leaves a token out.

        Args:
            logits: `[batch, tokens, classes]`.
            *fields: the other fields, in their order.
            **others: the other fields by name.

        Raises:
            ValueError: the logits have another number of dimensions.

        Example:
            >>> import torch
            >>> Outputs.of_tokens(torch.zeros(2, 7, 50)).logits.shape
            torch.Size([2, 50, 7, 1])
        """
        if logits.dim() != 3:
            raise ValueError(f"`logits` must be [batch, tokens, classes], got shape {tuple(logits.shape)}.")
        return cls(logits.transpose(1, 2)[..., None], *fields, **others)

    def select(self, kinds: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of the fields among `kinds`: `logits`, `features[0]`, `features[1]`, ..., `attentions[0]`.

        With the features comes `classified`.
        """
        if "logits" in kinds:
            yield "logits", self.logits
        for kind in ("features", "attentions"):
            if kind in kinds:
                yield from ((f"{kind}[{i}]", x) for i, x in enumerate(getattr(self, kind)))
        if "features" in kinds and self.classified is not None:
            yield "classified", self.classified

    def check(self, network: str) -> None:
        """Raise a ValueError unless the fields are dense tensors of their shapes, and tuples of them.

        Args:
            network: whose outputs they are, for the message: `student` or `teacher`.
        """
        for kind in ("features", "attentions"):
            maps = getattr(self, kind)
            if isinstance(maps, Tensor):
                raise ValueError(
                    f"`{kind}` of the {network} must be a tuple with one tensor per stage, got a single tensor of "
                    f"shape {tuple(maps.shape)}. Pass a tuple of one: (x,)."
                )
            if not isinstance(maps, tuple | list):
                raise ValueError(f"`{kind}` of the {network} must be a tuple of tensors, got {type(maps).__name__}.")
        for name, x in (*self.select(("logits", "features", "attentions")), ("images", self.images)):
            if x is None and name == "images":
                continue
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
                kind = f"a tensor of {x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"`{name}` of the {network} must be a dense tensor of floating-point numbers, got {kind}."
                )
            if name.startswith(("features", "classified")) and not 2 <= x.dim() <= 4:
                raise ValueError(
                    f"`{name}` of the {network} must be [batch, channels, height, width], [batch, tokens, channels] or "
                    f"[batch, channels], got shape {tuple(x.shape)}."
                )
            if name.startswith("attentions") and (x.dim() != 4 or x.shape[2] != x.shape[3]):
                raise ValueError(
                    f"`{name}` of the {network} must be [batch, heads, tokens, tokens], got shape {tuple(x.shape)}."
                )
        for member in self.members:
            if not isinstance(member, Outputs):
                raise ValueError(f"`members` of the {network} must be Outputs, got {type(member).__name__}.")
            member.check(f"{network}'s member")

    def detach(self) -> "Outputs":
        """The same values, detached from the autograd graph."""
        return self.map(Tensor.detach)

    def of(self, kinds: Container[str]) -> "Outputs":
        """The logits, and of the other fields those among `kinds`; of the members too."""
        return Outputs(
            self.logits,
            self.features if "features" in kinds else (),
            self.attentions if "attentions" in kinds else (),
            self.images if "images" in kinds else None,
            tuple(member.of(kinds) for member in self.members),
            self.classified if "features" in kinds else None,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Outputs":
        """The outputs with `change` applied to every tensor."""
        return Outputs(
            change(self.logits),
            tuple(change(f) for f in self.features),
            tuple(change(a) for a in self.attentions),
            None if self.images is None else change(self.images),
            tuple(member.map(change) for member in self.members),
            None if self.classified is None else change(self.classified),
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

    Raises:
        ValueError: a progress outside of [0, 1], or ids that are not whole numbers of at least 0, one per sample.
    """

    progress: float = 0.0
    remaining: Callable[[int, Tensor], Tensor] | None = None
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.progress, Real) or not 0 <= self.progress <= 1:
            raise ValueError(f"`progress` of a Moment must be a number in [0, 1], got {self.progress!r}.")
        ids = self.ids
        if ids is None:
            return
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            kind = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"`ids` of a Moment must be whole numbers [batch], got {kind}.")
        if len(ids) and int(ids.min()) < 0:
            raise ValueError(f"`ids` of a Moment must be at least 0, got {int(ids.min())}.")


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
