"""Prioritized paths (Cream of the Crop): the best paths so far are the teachers of the path that is trained."""

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Step
from kdnas.losses.base import Loss
from kdnas.numerics import widen
from kdnas.outputs import Moment, Outputs
from kdnas.ranks.tensors import gathered, mean
from kdnas.space import SearchSpace
from kdnas.specs import Spec, check_literals, spec
from kdnas.supernet import Supernet
from kdnas.values import Amount, Rate

SOFT = spec("kdnas.losses.response.soft_targets:SoftTargets", temperature=1.0)
_ABSENT = -1  # code of a choice that a path does not have


class _Prioritized(NamedTuple):
    """A path on the board, its accuracy on the batch it was trained with, and its multiply-accumulates."""

    architecture: Architecture
    accuracy: float
    macs: int


class _Match(NamedTuple):
    """The board's entry that the matcher chose: its place on the board, its weight, and the matcher's input."""

    place: int
    weight: float
    difference: Tensor


@final
class Prioritized(Distiller):
    """Each step trains a uniformly sampled path on the labels and on the best-matching path of a board.

    `L = CE(a, labels) + rho_k soft(a, b_k)` with `k = argmax_j rho_j`. The match of path `a` with the board's entry `j`
    is `rho_j = sigmoid(M(softmax f(x_j; a) - p_j))`: `x_j` are the images that the entry stores, `p_j` its own class
    probabilities on them when it was admitted, `M` a linear map from the `slice_size * classes` differences to
    a number. The chosen entry's own weight is used, and its logits have no gradient. Before the share `warmup` of the
    training is done, and while the board is empty, `L` is the cross-entropy only: SPOS.

    After the optimizer step the path may enter the board of `size` entries, sorted by accuracy on the batch
    (then by fewer multiply-accumulates). A path is on it once, with its better accuracy. While there is room
    every path is admitted; then,

    - `paper`: it replaces the worst entry if its accuracy is at least as high and its cost no higher;
    - `dominance`: a path that an entry dominates is not admitted; otherwise the entries that it dominates are removed,
      and the worst if there are still too many.

    Every `every` steps `M` takes one step of plain gradient descent on its effect on the weights:
    `w'(M) = w - look_ahead * grad_w [rho(M) soft(a, b; first slice)]`, `M <- M - meta_rate * grad_M CE(f(second
    slice; w'(M)), labels)`. Only then does `M` change: it is a buffer, as the board is, so that both are checkpointed
    and neither is the optimizer's.

    All passes but the trained path's own, the matcher's on at most `size * slice_size` images, use batch statistics
    and leave those of the supernet unchanged.

    Args:
        size: entries of the board (the paper's K).
        slice_size: images that an entry stores; also of each half of the meta step.
        warmup: share of the training without distillation (the authors' 20 of 120 epochs).
        every: steps between the matcher's updates (the paper's tau).
        meta_rate: step size of the matcher.
        look_ahead: step size of the imagined weight update, the paper's xi: the recipe's learning rate.
        admission: `paper` or `dominance`.
        soft: the loss between the path and the entry.
        label_smoothing: label smoothing of the trained path's cross-entropy.

    Raises:
        ValueError: a setting out of range; a batch of fewer than two slices.

    Reference: Peng et al., Cream of the Crop: Distilling Prioritized Paths for One-Shot Neural Architecture
        Search, NeurIPS 2020, section 3, equations 4 to 8.
    Differs: from the released code, which weighs distillation by the sigmoid of minus the *last* entry's match, trains
        the matcher in every step through the training loss, stores a teacher's output as the newcomer's, computes the
        look-ahead with the matcher's step size and the gradient of one weight tensor, and updates running statistics
        in its extra passes; this follows the paper. A sigmoid keeps the weights between 0 and 1, as in the code.
        Both slices of the meta step come from the training batch, as in the code, and not from a validation set.
    """

    model_type: ClassVar[type[Supernet]] = Supernet
    parallel: ClassVar[Parallel] = "same"
    of_images: ClassVar[bool] = True

    paths: Tensor
    accuracies: Tensor
    macs: Tensor
    images: Tensor
    probabilities: Tensor
    count: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        *,
        size: int = 10,
        slice_size: int = 4,
        warmup: float = 1 / 6,
        every: int = 200,
        meta_rate: Amount = 1e-4,
        look_ahead: Amount = 0.1,
        admission: Literal["paper", "dominance"] = "paper",
        soft: Spec = SOFT,
        label_smoothing: Rate = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("slice_size", slice_size), ("every", every)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= warmup <= 1:
            raise ValueError(f"`warmup` must be between 0 and 1, got {warmup}.")
        check_literals(type(self), locals())
        self.size, self.slice_size, self.warmup, self.every = size, slice_size, warmup, every
        self.meta_rate, self.look_ahead, self.admission = meta_rate, look_ahead, admission
        self.soft, self.label_smoothing = soft.build(Loss), label_smoothing
        self.space: SearchSpace | None = None
        self._trained: tuple[Architecture, Tensor, _Match | None] | None = None

    @property
    def uses_teacher(self) -> bool:
        """No: the teachers are paths."""
        return False

    def prepare(self, model: Model, batch: Batch) -> None:
        """Allocate the empty board and the matcher, in the shapes of this batch."""
        assert isinstance(model, Supernet)
        if len(batch.images) < 2 * self.slice_size:
            raise ValueError(
                f"a batch must contain two slices of {self.slice_size} images, got {len(batch.images)}. Raise "
                "batch_size or lower slice_size."
            )
        self.space = model.space
        largest = model(batch.images, model.space.largest, batch_statistics=True)
        self.soft.prepare(largest, largest, elastic=True)
        device, classes = batch.images.device, largest.logits.shape[1]
        places, images, shape = self.size, self.slice_size, batch.images.shape[1:]
        self.register_buffer("paths", torch.full((places, len(model.space.choices)), _ABSENT, device=device))
        self.register_buffer("accuracies", torch.zeros(places, dtype=torch.float64, device=device))
        self.register_buffer("macs", torch.zeros(places, dtype=torch.int64, device=device))
        self.register_buffer("images", torch.zeros(places, images, *shape, device=device))
        self.register_buffer("probabilities", torch.zeros(places, images, classes, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        matcher = nn.Linear(images * classes, 1)
        self.register_buffer("weight", matcher.weight.detach()[0].to(device))
        self.register_buffer("bias", matcher.bias.detach()[0].to(device))

    @property
    def board(self) -> tuple[_Prioritized, ...]:
        """The prioritized paths, best first: architecture, accuracy, macs."""
        count = int(self.count)
        rows = zip(self.paths[:count], self.accuracies[:count].tolist(), self.macs[:count].tolist(), strict=True)
        return tuple(_Prioritized(self._decode(path), accuracy, macs) for path, accuracy, macs in rows)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss."""
        assert isinstance(model, Supernet)
        path = model.space.sample(step.rng("architectures"))
        match = self.match(model, path) if step.progress >= self.warmup and int(self.count) else None
        student = model(batch.images, path)
        loss = batch.task.loss(widen(student.logits), batch.labels, self.label_smoothing)
        if match is not None:
            teacher, at = self._teacher(model, match, batch.images), Moment(step.progress, ids=batch.ids)
            loss = loss + match.weight * self.soft(student, teacher, batch.labels, at)
        self._trained = path, student.logits.detach(), match
        yield "path", loss

    def match(self, model: Supernet, path: Architecture) -> _Match:
        """The board's entry that matches a path best; of equal matches the better entry."""
        count = int(self.count)
        with torch.no_grad():
            logits = _run(model, path, self.images[:count].flatten(0, 1)).logits
            probabilities = widen(logits).softmax(1).unflatten(0, (count, self.slice_size))
            differences = (probabilities - self.probabilities[:count]).flatten(1)
            weights = torch.sigmoid(differences @ self.weight + self.bias)
            place = int(weights.argmax())
            return _Match(place, float(weights[place]), differences[place])

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """The matcher's step, if it is due, and the board's."""
        assert isinstance(model, Supernet) and self._trained is not None
        path, logits, match = self._trained
        self._trained = None
        if match is not None and (step.index + 1) % self.every == 0:
            gradients = self.meta_gradient(model, batch, path, match, step)
            for tensor, gradient in zip((self.weight, self.bias), gradients, strict=True):
                tensor -= self.meta_rate * gradient
        accuracy = float(batch.task.quality(mean(batch.task.grades(logits, batch.labels).double().mean(0))))
        probabilities = widen(_first(logits, self.slice_size)).softmax(1)
        macs = cost(model.space.blueprint(path)).macs
        self.admit(path, accuracy, macs, _first(batch.images, self.slice_size), probabilities)

    def meta_gradient(
        self, model: Supernet, batch: Batch, path: Architecture, match: _Match, step: Step
    ) -> tuple[Tensor, Tensor]:
        """The gradients, with respect to the matcher's weight and bias, of the loss after the look-ahead step."""
        first, second = slice(self.slice_size), slice(self.slice_size, 2 * self.slice_size)
        images, labels, ids = (_first(x, second.stop) for x in (batch.images, batch.labels, batch.ids))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        uses = Counter(model.uses)  # a look-ahead trains nothing
        student = _run(model, path, images[first])
        teacher = self._teacher(model, match, images[first])
        at = Moment(step.progress, ids=ids[first])
        distilled = self.soft(student, teacher, labels[first], at)
        # The match does not depend on the weights, so the inner gradient needs no graph of its own.
        inner = torch.autograd.grad(distilled, list(parameters.values()), allow_unused=True)
        matcher = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        chosen = torch.sigmoid(match.difference @ matcher[0] + matcher[1])
        stepped = {
            name: p.detach() if gradient is None else p.detach() - self.look_ahead * chosen * gradient
            for (name, p), gradient in zip(parameters.items(), inner, strict=True)
        }
        ahead = functional_call(model, stepped, (images[second], path), {"regularise": False, "batch_statistics": True})
        loss = batch.task.loss(widen(ahead.logits), labels[second])
        weight, bias = torch.autograd.grad(loss, matcher)
        model.uses = uses
        return weight, bias

    def admit(self, path: Architecture, accuracy: float, macs: int, images: Tensor, probabilities: Tensor) -> bool:
        """Admit a path to the board by the rule of admission; returns whether it was.

        Args:
            path: the newcomer.
            accuracy: on the batch it was trained with.
            macs: its cost.
            images: `[slice, channels, height, width]`, to store.
            probabilities: `[slice, classes]`, its own on them.
        """
        board = list(self.board)
        newcomer = _Prioritized(path, accuracy, macs)
        places = [i for i, entry in enumerate(board) if entry.architecture != path]
        if any(entry.accuracy > accuracy for i, entry in enumerate(board) if i not in places):
            return False
        if self.admission == "dominance":
            if any(_dominates(board[i], newcomer) for i in places):
                return False
            places = [i for i in places if not _dominates(newcomer, board[i])]
        if len(places) == self.size:
            worst = board[places[-1]]
            better = (accuracy, -macs) >= (worst.accuracy, -worst.macs)
            if self.admission == "paper":
                better = accuracy >= worst.accuracy and macs <= worst.macs
            if not better:
                return False
            places.pop()
        place = sum((-board[i].accuracy, board[i].macs) <= (-accuracy, macs) for i in places)
        order = [*places[:place], -1, *places[place:]]
        new = {
            "paths": self._encode(path),
            "accuracies": torch.tensor(accuracy, dtype=torch.float64),
            "macs": torch.tensor(macs),
            "images": images,
            "probabilities": probabilities,
        }
        for name, value in new.items():
            buffer = getattr(self, name)
            rows = [value.to(buffer) if i < 0 else buffer[i].clone() for i in order]
            buffer[: len(rows)] = torch.stack(rows)
        self.count.fill_(len(order))
        return True

    def _teacher(self, model: Supernet, match: _Match, images: Tensor) -> Outputs:
        with torch.no_grad():
            return _run(model, self._decode(self.paths[match.place]), images)

    def _encode(self, path: Architecture) -> Tensor:
        assert self.space is not None
        choices = self.space.choices
        return torch.tensor([c.options.index(path[c.name]) if c.name in path else _ABSENT for c in choices])

    def _decode(self, path: Tensor) -> Architecture:
        assert self.space is not None
        pairs = zip(self.space.choices, path.tolist(), strict=True)
        return self.space.architecture({c.name: c.options[place] for c, place in pairs if place != _ABSENT})


def _run(model: Supernet, path: Architecture, images: Tensor) -> Outputs:
    """A path's outputs without dropout, with batch statistics; the supernet's running ones are unchanged."""
    return model(images, path, regularise=False, batch_statistics=True)


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows of the whole batch, of which several processes have parts."""
    return gathered(rows[:count])[:count]


def _dominates(first: _Prioritized, second: _Prioritized) -> bool:
    no_worse = first.accuracy >= second.accuracy and first.macs <= second.macs
    return no_worse and (first.accuracy > second.accuracy or first.macs < second.macs)
