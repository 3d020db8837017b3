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
_BASE: dict[str, Tensor] = {}  # what all processes had of it in common the last time, where its parts are spread
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
    _BASE.clear()
    if training.recipe.per_process == "blocks":
        _BASE.update({name: tensor.clone() for name, tensor in _tensors(training).items()})


def _take(index: int, watch: bool, weigh: bool) -> dict[str, float]:
    """One step of this process's copy, which follows the first in its number."""
    (training,) = _PRESENT
    training.index = index
    with _observed(training):
        values = training.take(watch, weigh)
    team.note("gradient", float(training.gradient_norm).hex())
    if index % _WEIGHTS == 0 and not is_spread(training):
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
    parameters = _parameters(training)
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


def is_spread(training: "Training") -> bool:
    """Whether each process trains parts of the model, on the whole batch."""
    return tensors.size() > 1 and training.recipe.per_process == "blocks"


def joined_losses(training: "Training", losses: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
    """Names and values of all parts' losses, of which each process has some."""
    own, names = dict(losses), list(training.distiller.parts)
    zero = torch.zeros_like(losses[0][1])
    (values,) = tensors.total([torch.stack([own.get(name, zero) for name in names])])
    return names, values


def whole_norm(training: "Training", norm: Tensor) -> Tensor:
    """The Euclidean norm of the whole gradient, from that of this process's."""
    if not is_spread(training):
        return norm
    (square,) = tensors.total([norm.double().square()])
    return square.sqrt().to(norm.dtype)


def collect(training: "Training") -> None:
    """Put all parts of a training that are spread over processes in place: weights, statistics, optimizer."""
    if team.leads() and training.is_shared and training.recipe.per_process == "blocks":
        team.everywhere(_collect)


@torch.no_grad()
def _collect() -> None:
    (training,) = _PRESENT
    _fill_state(training)
    mine = _tensors(training)
    # Each is changed by one process at most.
    changed = {name: not torch.equal(t, _BASE.get(name, torch.zeros_like(t))) for name, t in mine.items()}
    own = [tensor if changed[name] else torch.zeros_like(tensor) for name, tensor in mine.items()]
    flags, *sums = tensors.total([torch.tensor([float(flag) for flag in changed.values()]), *own])
    for tensor, flag, value in zip(mine.values(), flags.tolist(), sums, strict=True):
        if flag:
            tensor.copy_(value)
    _BASE.update({name: tensor.clone() for name, tensor in mine.items()})


def _tensors(training: "Training") -> dict[str, Tensor]:
    """All tensors that steps change, by name; those of the optimizer as far as there are any."""
    listed: dict[str, Tensor] = {}
    for part, module in (("model", training.model), ("distiller", training.distiller)):
        listed |= {
            f"{part}.{name}": tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
    for place, parameter in enumerate(_parameters(training)):
        state = training.optimizer.state.get(parameter, {})
        listed |= {f"optimizer.{place}.{key}": state[key] for key in sorted(state) if isinstance(state[key], Tensor)}
    return listed


def _fill_state(training: "Training") -> None:
    """Give the optimizer a state of zeros for parameters that only other processes have trained."""
    states, parameters = training.optimizer.state, _parameters(training)
    (anywhere,) = tensors.total([torch.tensor([float(bool(states.get(p))) for p in parameters])])
    for parameter, count in zip(parameters, anywhere.tolist(), strict=True):
        if count and not states.get(parameter):
            names = (
                ("momentum_buffer",) if isinstance(training.optimizer, torch.optim.SGD) else ("exp_avg", "exp_avg_sq")
            )
            states[parameter] = {name: torch.zeros_like(parameter) for name in names}
            if "exp_avg" in names:
                states[parameter]["step"] = torch.tensor(0.0)


def _parameters(training: "Training") -> list[nn.Parameter]:
    return [p for group in training.optimizer.param_groups for p in group["params"]]


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
    if recipe.activations == "recomputed":
        raise ValueError(
            "`activations` must be kept with several processes, got recomputed: statistics of the whole batch would be "
            "exchanged in the backward pass."
        )
    if recipe.execution == "compiled":
        raise ValueError("`execution` must be eager with several processes, got compiled.")
    if recipe.per_process == "blocks":
        _check_spread(distiller, processes)
        return
    check_batch(recipe, num_images)
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


def check_batch(recipe: Recipe, num_images: int | None = None) -> None:
    """Raise a ValueError where a batch has no equal part for each of the processes that there are.

    Args:
        recipe: of the training.
        num_images: of the train part, where it is known.
    """
    processes = team.number()
    batch = recipe.batch_size if num_images is None else min(recipe.batch_size, num_images)
    if recipe.per_process != "blocks" and batch % processes:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of processes, {processes}, got {batch}: each has an equal "
            "part."
        )


def _check_spread(distiller: Distiller, processes: int) -> None:
    if not distiller.is_separable:
        raise ValueError(
            f"`per_process` must not be blocks with {type(distiller).__name__}, got blocks: only those of block_wise, "
            "all of them in every step, are trained apart."
        )
    if 0 < len(distiller.parts) < processes:
        raise ValueError(
            f"`per_process` blocks needs a block for each process, got {len(distiller.parts)} blocks and {processes} "
            "processes. Start fewer."
        )
