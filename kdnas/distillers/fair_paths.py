"""Strict fairness: every option of every choice is trained equally often in every update."""

import math
import random
from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from kdnas.architecture import Architecture, Choice, Value
from kdnas.distillers.base import Batch, Model, ObjectiveDistiller, Parallel, Step
from kdnas.space import SearchSpace
from kdnas.specs import Spec
from kdnas.supernet import Supernet
from kdnas.values import Count, Rate


@final
class FairPaths(ObjectiveDistiller):
    r"""One update is m paths, whose gradients are summed: each of a layer's m operations is in exactly one of them.

    $\pi_l$ is a random permutation of layer $l$'s options, and path $i$ takes $\pi_l(i)$ in every layer;
    $L = \sum_{i=1}^{m} \mathrm{CE}(\mathrm{path}_i, \mathrm{labels})$ plus the `terms`. If the
    choices have different numbers of options, m is their least common multiple, and an option of a choice with n is in
    exactly m / n paths. The input size is not an operation: it is sampled once per update.

    Args:
        terms: pairs of weight and loss between a path and the teacher; empty for none.
        label_smoothing: label smoothing of the cross-entropy; None for none, without labels.
        most: paths per update; a space that needs more is refused.

    Raises:
        ValueError: at `prepare`, if a choice exists only with others, if two encodings are one network (its
            operations then move between layers), or if more than `most` paths are needed.

    Reference: Chu, Zhang, Xu, FairNAS: Rethinking Evaluation Fairness of Weight Sharing Neural Architecture Search,
        ICCV 2021, definition 2 and algorithm 1.
    Differs: the paper has the same number of operations in all layers.
    """

    model_type: ClassVar[type[Supernet]] = Supernet
    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self, *, terms: tuple[tuple[float, Spec], ...] = (), label_smoothing: Rate | None = 0.0, most: Count = 12
    ) -> None:
        super().__init__(terms, label_smoothing=label_smoothing)
        self.most = most

    def prepare(self, model: Model, batch: Batch) -> None:
        """Check the space, and build the losses' learnable parts."""
        assert isinstance(model, Supernet)
        num_paths(model.space, self.most)
        for seed in range(4):
            paths(model.space, random.Random(seed), self.most)
        super().prepare(model, batch)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss per path."""
        assert isinstance(model, Supernet)
        for path in paths(model.space, step.rng("architectures"), self.most):
            student = model(batch.images, path)
            yield from self.student_losses("path", student, model, batch, step, path)
            del student  # the graph: one path's activations alive at a time


def num_paths(space: SearchSpace, most: int) -> int:
    """Number of paths that an update needs.

    Raises:
        ValueError: a choice that does not always exist, or more than `most`.
    """
    for choice in space.choices:
        if choice.needs is not None:
            raise ValueError(
                f"strict fairness needs every choice in every network, but {choice.name} exists only with some "
                f"{choice.needs}. Give {choice.needs} one option, or use single_path."
            )
    number = math.lcm(*(len(choice.options) for choice in space.choices if choice.name != "resolution"))
    if number > most:
        raise ValueError(
            f"strict fairness needs {number} paths per update in this space, but `most` is {most}. Give all choices "
            f"equally many options, or raise `most` to {number}."
        )
    return number


def paths(space: SearchSpace, rng: random.Random, most: int) -> list[Architecture]:
    """The paths of one update.

    Raises:
        ValueError: two encodings are one network, so that a sampled operation is not the one that would be trained.
    """
    number = num_paths(space, most)
    columns: dict[str, list[Value]] = {}
    for choice in space.choices:
        if choice.name == "resolution":
            columns[choice.name] = [rng.choice(choice.options)] * number
        else:
            columns[choice.name] = list(choice.options) * (number // len(choice.options))
            rng.shuffle(columns[choice.name])
    architectures = []
    for index in range(number):

        def pick(choice: Choice, index: int = index) -> Value:
            return columns[choice.name][index]

        path = space.decide(pick)
        if any(path[name] != values[index] for name, values in columns.items()):
            raise ValueError(
                "strict fairness needs a space in which each encoding is a network of its own; here an operation "
                "moves to another layer. Use single_path."
            )
        architectures.append(path)
    return architectures
