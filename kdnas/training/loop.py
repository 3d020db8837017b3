"""The training loop: a distiller yields losses, the loop runs backward on each and takes one optimizer step."""

import math
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from kdnas.compilation import check_compiler, compiling
from kdnas.data.base import Data
from kdnas.data.feeding import Feed, Steps, num_decoders
from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.losses.base import Loss
from kdnas.losses.objective import Objective, Share
from kdnas.network import load_strictly, recomputing, repeatable, without_weights
from kdnas.outputs import Moment
from kdnas.randomness import seed_of
from kdnas.ranks import team, tensors
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.teachers.base import Teacher, every_layer
from kdnas.teachers.cache import TeacherCache
from kdnas.training import shared
from kdnas.training.scale import LossScale

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_LEAST_SCALE = 2.0**-14  # a gradient that is infinite below this is no matter of the scale


@final
class Training:
    """A training of a model. `step()` takes one step; `state()` is all that a resumed training needs.

    On a CPU the student's images are in the channels-last format, which its layers keep and which is faster
    there, unless a strided 1x1 convolution is among them (docs/numerics.md).

    The processes of `torchrun` each have a copy, and all take a step together (`kdnas.ranks`): each on its part of the
    batch, with one exchange of the whole gradient before the optimizer step.

    Attributes:
        index: number of steps taken.
        is_shared: whether the processes that follow this one have its present state.
        is_new: whether no step was taken since it was made.
        schedule: how the distiller divides the training.
        gradient_norm: Euclidean norm of the whole gradient of the last step that was not left out, before clipping.
        conflict: cosine between the last watched step's gradient from its first loss (a sandwich's largest subnet) and
            from all others; None if there was one loss only, or one of the gradients was zero.
        shares: of the terms of the losses in the last step that was weighed, by name; empty where there are none.
        scale: of the losses in float16; None in other precisions.

    Args:
        model: a supernet or a network.
        distiller: yields the losses of each step.
        data: its train part gives the batches.
        teacher: None if the distiller uses none.
        recipe: number of steps, batch size and optimizer settings.
        device: where to compute.
        cache: the teacher's outputs, in place of running it, which needs no place then; batches are the cache's views
            of the images.

    Raises:
        ValueError: the distiller is for another kind of model, or needs teacher layers that the cache does not store;
            or layers are to be compiled, and there is no compiler.
    """

    def __init__(
        self,
        model: Model,
        distiller: Distiller,
        data: Data,
        teacher: Teacher | None,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        cache: TeacherCache | None = None,
    ) -> None:
        distiller.check_model_type(type(model))
        distiller.suit(data.task)
        self.device = torch.device(device)
        if recipe.execution == "compiled":
            check_compiler(self.device)
        if distiller.every_layer and cache is not None:
            raise ValueError(
                "this distiller needs every teacher layer, but the cache stores one feature map per stage; disable the "
                "cache with teacher_views=0."
            )
        if distiller.every_layer and teacher is not None:
            teacher = every_layer(teacher)
        if distiller.reads_attentions and teacher is not None and cache is None:
            teacher = teacher.with_attentions()
        self.model, self.distiller = model.to(self.device), distiller.to(self.device)
        self.teacher = None if teacher is None or cache is not None else teacher.to(self.device)
        self.data, self.recipe, self.index, self.cache = data, recipe, 0, cache
        self.is_shared, self.is_new = False, True
        steps = Steps(data, recipe.seed, recipe.batch_size, 0 if cache is None else cache.views)
        self._feed = Feed(steps, recipe.steps, 0)
        self._memory_format: torch.memory_format | None = None  # as they are, for the first batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(recipe.seed, "parts"))
            with torch.no_grad():
                distiller.prepare(model, self._batch(0))
        self.distiller.to(self.device)
        last = self.device.type == "cpu" and not _strided_points(self.model, self.distiller)
        self._memory_format = torch.channels_last if last else torch.contiguous_format
        decoders = num_decoders(self.device, decodes=data.train.is_decoded)
        self._feed = Feed(steps, recipe.steps, decoders, pinned=self.device.type == "cuda")
        self.optimizer = _optimizer([self.model, self.distiller], recipe)
        self.schedule = distiller.schedule(recipe.steps)
        self.gradient_norm = torch.zeros(())
        self.conflict: float | None = None
        self.shares: dict[str, Share] = {}
        self.scale = LossScale() if recipe.precision == "float16" else None

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.index >= self.recipe.steps

    @property
    def epoch_steps(self) -> int:
        """Steps in one pass over the train part."""
        return len(self.data.train) // self._feed.steps.size

    def step(self, *, watch: bool = False, weigh: bool = False) -> dict[str, float]:
        """One step: backward of each loss, one optimizer step. Returns the losses' values by name.

        Args:
            watch: also measure `conflict`, which costs a copy of the gradient; nothing else changes.
            weigh: also measure `shares`, which costs a backward pass per loss term; nothing else changes.

        Raises:
            FloatingPointError: a loss is not finite; the weights are as they were before the step.
            ValueError: several processes cannot share the training, or one of them is lost.
        """
        return shared.step(self, watch, weigh) if team.leads() else self.take(watch, weigh)

    def take(self, watch: bool, weigh: bool) -> dict[str, float]:
        """One step of this process; see `step`."""
        recipe = self.recipe
        own = tensors.rank() if recipe.per_process == "architectures" else 0
        step = Step(self.index, recipe.steps, recipe.seed, self.rate(self.index), weigh, own)
        if self.index in self.schedule.restarts and self.index > 0:
            self.optimizer = _optimizer([self.model, self.distiller], recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.index) * group.get("share", 1.0)
        self.model.train()
        self.distiller.train()
        # Dropout draws from the global generator: seeded per step, and restored afterwards.
        with repeatable(self.device), torch.random.fork_rng(devices=[]):
            process = tensors.rank()
            torch.manual_seed(seed_of(recipe.seed, "step", self.index, *[process] * (process > 0)))
            count = self._feed.steps.size
            self._feed = self._feed.taking(slice(0, count) if shared.is_spread(self) else tensors.part(count))
            batch = self._batch(self.index)
            # Images may be slow to read, and first steps in other ways; later ones take all processes equally long.
            team.meet("a step", careful=self.is_new)
            with tensors.sharing(recipe.per_process):
                with recomputing(recipe.activations == "recomputed"), compiling(recipe.execution == "compiled"):
                    values = self._backward(batch, step, watch)
                self._optimize()
                self.distiller.after(self.model, batch, step)
        self.index += 1
        self.is_new = False
        return values

    def rate(self, index: int) -> float:
        """The learning rate of a step."""
        return self.recipe.rate(*self.schedule.curve(index))

    def _backward(self, batch: Batch, step: Step, watch: bool) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[tuple[str, Tensor]] = []
        first: list[tuple[nn.Parameter, Tensor]] = []
        generator = self.distiller.losses(self.model, batch, step)
        is_spread = shared.is_spread(self)
        reads_gradients = tensors.size() > 1 and shared.reads_gradients(self.distiller)
        half = _HALVES.get(self.recipe.precision)
        autocast = torch.autocast(self.device.type, half or torch.bfloat16, enabled=half is not None)
        while True:
            with autocast:
                yielded = next(generator, None)
            if yielded is None:
                break
            name, loss = yielded
            losses.append((name, loss.detach()))
            (loss if self.scale is None else loss * self.scale.value).backward()
            if reads_gradients:
                shared.average(self, losses[-1][1])
            if watch and len(losses) == 1:
                first = [(p, p.grad.clone()) for p in self.model.parameters() if p.grad is not None]
        if is_spread:
            names, means = shared.joined_losses(self, losses)
        else:
            names, means = [n for n, _ in losses], shared.average(self, torch.stack([loss for _, loss in losses]))
        values = self._values(names, means)
        if step.weigh:
            known = (module.shares for module in self.distiller.modules() if isinstance(module, Objective))
            self.shares = next((shares for shares in known if shares), {})
        if watch:
            if tensors.size() > 1 and not reads_gradients and not is_spread:
                first = shared.averaged_pairs(self, first)
            self.conflict = _conflict(first) if len(losses) > 1 else None
        return values

    def _optimize(self) -> None:
        """The optimizer step; none where a scaled gradient is not finite, which a smaller scale may mend."""
        parameters = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.scale is not None:
            torch._foreach_div_(gradients, self.scale.value)
        norm = shared.whole_norm(self, torch.nn.utils.get_total_norm(gradients))
        if self.scale is not None:
            if not torch.isfinite(norm) and self.scale.value > _LEAST_SCALE:
                return self.scale.left_out()
            self.scale.step_taken()
        self.gradient_norm = norm
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.index}, though the losses are. Start again in another "
                f"output folder with a lower learning rate (it was {self.rate(self.index):.3g}) or in float32."
            )
        if self.recipe.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip, self.gradient_norm)
        self.optimizer.step()

    def _values(self, names: list[str], losses: Tensor) -> dict[str, float]:
        # One transfer from the device for all losses, before the weights are touched.
        values: dict[str, float] = {}
        for name, value in zip(names, losses.tolist(), strict=True):
            values[name] = values.get(name, 0.0) + value
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss {name!r} became {value} at step {self.index}. Lower the learning rate (it was "
                    f"{self.rate(self.index):.3g}) or clip gradients; training can be resumed from the last "
                    "checkpoint."
                )
        return values

    def state(self) -> dict[str, Any]:
        """Weights, learnable parts, optimizer and step, of all processes."""
        shared.collect(self)
        scale = {} if self.scale is None else {"scale": asdict(self.scale)}
        return scale | {
            "model": dict(self.model.state_dict()),
            "distiller": dict(self.distiller.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "index": self.index,
            "uses": dict(self.model.uses) if isinstance(self.model, Supernet) else {},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: the state is of another space, distiller or recipe.
        """
        try:
            load_strictly(self.model, state["model"], "the checkpoint")
            load_strictly(self.distiller, state["distiller"], "the checkpoint's part of the distiller")
            self.optimizer.load_state_dict(state["optimizer"])
            self.index = int(state["index"])
            self.scale = self.scale and LossScale(**state["scale"])
            if isinstance(self.model, Supernet):
                self.model.uses = Counter(state["uses"])
            self.is_shared = False
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint is of another search space or distiller: {str(error).rstrip('.')}. Use another output "
                "folder, or the settings of the checkpoint."
            ) from error

    def close(self) -> None:
        """End the processes that decode; another step starts them again."""
        self._feed.close()

    def _batch(self, index: int) -> Batch:
        """The images of a step, those of this process."""
        steps, cache = self._feed.steps, self.cache
        ids, view = steps.indices(index)[steps.rows], steps.view(index)
        pixels = self._feed(index).to(self.device, non_blocking=True)
        labels, data = steps.labels(index), self.data
        if not torch.isfinite(pixels).all():
            bad = ids[~pixels.isfinite().flatten(1).all(1).cpu()].tolist()
            raise ValueError(f"training images must be finite, images {bad} contain NaN or infinity.")
        live = None if self.teacher is None else partial(self.teacher, at=Moment(index / self.recipe.steps, ids=ids))
        teach = live if cache is None else lambda pixels, _: cache.outputs(ids, view, pixels)
        batch = Batch(pixels, labels.to(self.device), ids, data, teach)
        if self._memory_format is not None:
            # A clone: images of one channel count as either, and layers keep the one that their strides say.
            batch.images = batch.images.clone(memory_format=self._memory_format)
        return batch


def _strided_points(model: Model, distiller: Distiller) -> bool:
    """Whether there is a convolution of one point and a stride, whose weights' gradient oneDNN gets wrong."""
    modules: list[nn.Module] = [model, distiller]
    if isinstance(model, Supernet):
        # Where a kernel is a choice, the bank holds the largest.
        modules.append(without_weights(model.space.blueprint(model.space.smallest)))
    convolutions = [m for module in modules for m in module.modules() if isinstance(m, nn.Conv2d)]
    return any(m.kernel_size == (1, 1) and m.stride != (1, 1) for m in convolutions)


def _optimizer(modules: list[nn.Module], recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    # A discriminator at the rate of a student trained with momentum wins at once, and teaches nothing then.
    shares: dict[nn.Parameter, float] = {}
    for loss in (part for module in modules for part in module.modules() if isinstance(part, Loss)):
        for name, largest in loss.discriminator_rates.items():
            share = min(1.0, largest / recipe.learning_rate)
            shares |= dict.fromkeys(loss.get_submodule(name).parameters(), share)
    groups: list[dict[str, Any]] = []
    for share in sorted({1.0, *shares.values()}, reverse=True):
        members = [p for p in parameters if shares.get(p, 1.0) == share]
        matrices, vectors = ([p for p in members if (p.dim() > 1) == matrix] for matrix in (True, False))
        groups.append({"params": matrices, "weight_decay": recipe.weight_decay, "share": share})
        groups.append({"params": vectors, "weight_decay": 0.0, "share": share})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)


def _conflict(first: list[tuple[nn.Parameter, Tensor]]) -> float | None:
    """The cosine between the gradients of the first loss and of all others; the parameters hold their sum."""
    sums = torch.zeros(3, dtype=torch.float64)
    for parameter, gradient in first:
        assert parameter.grad is not None
        own, other = gradient.double(), parameter.grad.double() - gradient.double()
        sums = sums.to(own.device) + torch.stack([(own * other).sum(), own.square().sum(), other.square().sum()])
    dot, first_square, other_square = sums.tolist()
    return dot / math.sqrt(first_square * other_square) if first_square > 0 and other_square > 0 else None
