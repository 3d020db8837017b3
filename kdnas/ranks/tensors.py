"""What the processes of a training exchange: means, whole batches, and the statistics of batch norm."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdnas.ranks.team import Team, present

_ALONE = ContextVar("alone", default=False)

# The value of a training is the mean of the processes' values, and so is its gradient. A process's own gradients are
# those of its own value: as many times too large as there are processes, until `averaged` divides them.


def rank() -> int:
    """The number of this process in a call of all, from 0; elsewhere 0."""
    team = present()
    return 0 if team is None else team.rank


def size() -> int:
    """The number of processes in a call of all; elsewhere 1."""
    team = present()
    return 1 if team is None else team.size


def sees_whole() -> bool:
    """Whether what couples the samples of a batch must see those of all processes."""
    team = present()
    return team is not None and team.per_process == "nothing" and not _ALONE.get()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, every process computes for itself: what it computes with is the whole batch already."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def part(count: int) -> slice:
    """This process's samples of a batch of so many: equal parts, in order."""
    each = count // size()
    return slice(rank() * each, (rank() + 1) * each)


def mine(index: int) -> bool:
    """Whether this process computes a part of a step that is spread over processes; of others each computes all."""
    team = present()
    return team is None or team.per_process != "blocks" or index % team.size == team.rank


@contextlib.contextmanager
def sharing(per_process: str) -> Iterator[None]:
    """Inside, the processes have this for themselves; with `nothing`, batch norm's statistics are the whole batch's.

    Args:
        per_process: see `Recipe.per_process`.
    """
    team = present()
    if team is None:
        yield
        return
    team.per_process = per_process
    with _WholeBatch(team) if per_process == "nothing" else contextlib.nullcontext():
        yield


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean over all processes of each tensor, by one exchange per dtype and device.

    The results are parts of one flat tensor; where there is one process, the tensors themselves.
    """
    return _reduced(tensors, size())


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over all processes of each tensor; see `averaged`."""
    return _reduced(tensors, 1)


def _reduced(tensors: Sequence[Tensor], divisor: int) -> list[Tensor]:
    team = present()
    if team is None:
        return list(tensors)
    results: dict[int, Tensor] = {}
    for kind in {(tensor.dtype, tensor.device): None for tensor in tensors}:  # in the order of all processes
        places = [place for place, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensors[place].detach().reshape(-1) for place in places])
        _sum(team, flat)
        parts = (flat / divisor if divisor > 1 else flat).split([tensors[place].numel() for place in places])
        results |= {place: part.view(tensors[place].shape) for place, part in zip(places, parts, strict=True)}
    return [results[place] for place in range(len(tensors))]


def mean(value: Tensor) -> Tensor:
    """The mean over all processes of a value that is itself a mean over samples; its gradient goes to each.

    Where each process trains its own architectures, and where there is one process, the value.
    """
    team = present()
    if team is None or team.per_process == "architectures":
        return value
    return value + (averaged([value])[0] - value.detach())


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in order; each process gets the gradient of its own.

    That is the whole gradient where every process computes the same from the result. Where each process trains its own
    architectures, and where there is one process, the rows.
    """
    team = present()
    if team is None or team.per_process == "architectures":
        return rows
    return _Gathered.apply(rows, team)  # type: ignore[no-any-return]


def _sum(team: Team, tensor: Tensor) -> None:
    team.exchange(tensor, lambda: dist.all_reduce(tensor, group=team.tensors))


def _all(team: Team, tensor: Tensor) -> Tensor:
    """Every process's tensor, `[processes, ...]`."""
    everyone = tensor.new_empty(team.size, *tensor.shape)
    whole = tensor.contiguous()
    team.exchange(whole, lambda: dist.all_gather(list(everyone.unbind()), whole, group=team.tensors))
    return everyone


@final
class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, team: Team) -> Tensor:
        ctx.team, ctx.count = team, len(rows)
        return _all(team, rows.detach()).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.team.rank * ctx.count
        return gradients[0][start : start + ctx.count] * ctx.team.size, None


@final
class _WholeBatch(TorchFunctionMode):
    """Inside, `torch.nn.functional.batch_norm` in training computes its statistics from all processes' batches."""

    def __init__(self, team: Team) -> None:
        super().__init__()
        self.team = team

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training or _ALONE.get():
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        normalised, center, variance, count = _Normalised.apply(x, eps, self.team)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(center.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1).clamp_min(1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        if weight is not None:
            normalised = normalised * weight.to(normalised.dtype).view(shape)
        if bias is not None:
            normalised = normalised + bias.to(normalised.dtype).view(shape)
        return normalised.to(x.dtype)


@final
class _Normalised(torch.autograd.Function):
    r"""$(x - \mu) / \sqrt{v + \epsilon}$ per channel, with $\mu$ and $v$ (divisor: values) of all processes' values.

    Of processes' own counts $n_r$, means and variances: $\mu = \sum_r n_r \mu_r / n$, and $v = \sum_r n_r (v_r +
    (\mu_r - \mu)^2) / n$, which does not cancel as a mean of squares does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, team: Team) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        dims = [0, *range(2, x.dim())]
        variance, center = torch.var_mean(wide, dims, correction=0)
        count = variance.new_tensor([wide.numel() // wide.shape[1]])
        centers, variances, counts = _all(team, torch.cat([center, variance, count])).split(
            [len(center), len(center), 1], dim=1
        )
        total = counts.sum()
        center = (counts * centers).sum(0) / total
        variance = (counts * (variances + (centers - center).square())).sum(0) / total
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = (variance + eps).rsqrt().view(shape)
        normalised = (wide - center.view(shape)) * scale
        ctx.save_for_backward(normalised, scale, total)
        ctx.team, ctx.dims, ctx.shape, ctx.dtype = team, dims, shape, x.dtype
        ctx.mark_non_differentiable(center, variance, total)
        return normalised, center, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normalised, scale, total = ctx.saved_tensors
        gradient = gradients[0]
        sums = torch.stack([gradient.sum(ctx.dims), (gradient * normalised).sum(ctx.dims)])
        _sum(ctx.team, sums)
        first, second = (row.view(ctx.shape) for row in sums / total)
        return (scale * (gradient - first - normalised * second)).to(ctx.dtype), None, None
