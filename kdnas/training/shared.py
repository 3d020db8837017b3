"""A training that several processes share: each takes its part of every batch, and the gradient is the mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdnas.distillers.base import Distiller
from kdnas.losses.base import Loss
from kdnas.network import hooked
from kdnas.ranks import team, tensors
from kdnas.settings import Recipe
from kdnas.supernet import Supernet

if TYPE_CHECKING:
    from kdnas.training.loop import Training

_PRESENT: list["Training"] = []  # the training whose steps are called
_WEIGHTS = 16  # steps between two comparisons of all weights


def step(training: "Training", watch: bool, weigh: bool) -> dict[str, float]:
    """One step of a training in all processes, of which this is the first.

    Raises:
        ValueError: the training cannot be shared, or a process has ended or does something else.
    """
    if not training.is_shared:
        check(training.distiller, training.recipe, len(training.data.train))
        if training.device.type == "cuda" and training.device.index not in (None, torch.cuda.current_device()):
            raise ValueError(f"`device` must be cpu or cuda with several processes, got {training.device}.")
        team.everywhere(_adopt, training)
        training.is_shared = True
    return team.everywhere(_take, training.index, watch, weigh, patience=team.PATIENCE)  # type: ignore[no-any-return]


def _adopt(training: "Training") -> None:
    _PRESENT[:] = [training]


def _take(index: int, watch: bool, weigh: bool) -> dict[str, float]:
    """One step of this process's copy, which follows the first in its number."""
    (training,) = _PRESENT
    training.index = index
    with _observed(training):
        values = training.take(watch, weigh)
    team.note("gradient", float(training.gradient_norm).hex())
    if index % _WEIGHTS == 0:
        weights = [p.detach() for module in (training.model, training.distiller) for p in module.parameters()]
        team.note("weights", float(torch.nn.utils.get_total_norm(weights)).hex())
    return values


@contextmanager
def _observed(training: "Training") -> Iterator[None]:
    """Inside, the processes agree on every architecture before they run it."""
    team.note("step", training.index)
    model = training.model
    if not isinstance(model, Supernet):
        yield
        return
    with hooked([model], before=lambda _, inputs: team.agree("architectures", model.space.code(inputs[1]))):
        yield


def average(training: "Training", losses: Tensor) -> Tensor:
    """Put the mean gradient of all processes in place of each parameter's own; returns the means of the losses.

    One exchange of one flat tensor: gradients, zeros where a process has none, and where no process has one, it stays
    None. Running statistics go with it where they are each process's own.
    """
    if tensors.size() == 1:
        return losses
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    own = training.recipe.per_process != "nothing"
    buffers = [b for b in training.model.buffers() if b.is_floating_point()] if own else []
    is_used = torch.tensor([p.grad is not None for p in parameters], dtype=losses.dtype, device=losses.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    shares, values, *means = tensors.averaged([is_used, losses, *buffers, *gradients])
    for parameter, gradient, share in zip(parameters, means[len(buffers) :], shares.tolist(), strict=True):
        parameter.grad = gradient if share > 0 else None
    for buffer, mean in zip(buffers, means, strict=False):
        buffer.copy_(mean)
    return values


def averaged_pairs(training: "Training", pairs: list[tuple[nn.Parameter, Tensor]]) -> list[tuple[nn.Parameter, Tensor]]:
    """The mean over all processes of gradients, which each has for some of the model's parameters."""
    own = dict(pairs)
    parameters = list(own)
    if training.recipe.per_process == "architectures":  # others have gradients for other parameters
        parameters = [p for p in training.model.parameters() if p.grad is not None]
    means = tensors.averaged([own.get(p, torch.zeros_like(p)) for p in parameters])
    return list(zip(parameters, means, strict=True))


def reads_gradients(distiller: Distiller) -> bool:
    """Whether the gradient between two losses of a step is read, so that it must be the mean by then."""
    return any(
        module.clipped if isinstance(module, Loss) else isinstance(module, Distiller) and module.reads_gradients
        for module in distiller.modules()
    )


def check(distiller: Distiller, recipe: Recipe, num_images: int | None = None) -> None:
    """Raise a ValueError where the processes that there are cannot share a training; one process always can.

    Args:
        distiller: of the training.
        recipe: of the training.
        num_images: of the train part, where it is known.
    """
    processes = team.number()
    if processes == 1:
        return
    batch = recipe.batch_size if num_images is None else min(recipe.batch_size, num_images)
    if batch % processes:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of processes, {processes}, got {batch}: each has an equal "
            "part."
        )
    distillers = [module for module in distiller.modules() if isinstance(module, Distiller)]
    alone = next((type(each).__name__ for each in distillers if each.parallel == "no"), None)
    if alone:
        raise ValueError(
            f"{alone} trains in one process: its class does not say that parts of a batch can be trained apart "
            "(`Distiller.parallel`). Start without torchrun, or use another distiller."
        )
    if recipe.per_process == "nothing":
        return
    losses = [module for module in distiller.modules() if isinstance(module, Loss)]
    stateful = next((type(loss).__name__ for loss in losses if loss.whole_batch and [*loss.buffers()]), None)
    if stateful:
        raise ValueError(
            f"`per_process` must be nothing with {stateful}, which remembers samples, got {recipe.per_process}."
        )
    same = next((type(each).__name__ for each in distillers if each.parallel == "same"), None)
    if same and recipe.per_process == "architectures":
        raise ValueError(
            f"`per_process` must be nothing or statistics with {same}, in which all samples of a step decide on "
            "architectures, got architectures."
        )
