"""Losses in a training loop of one's own: recorded stages, and everything that a loop owes to its losses."""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses._inputs import check_labels
from kdnas.losses.attention_layers import called_attention
from kdnas.losses.base import Loss
from kdnas.losses.objective import Objective
from kdnas.network import hooked
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec, nearest
from kdnas.values import shown


@final
class Recorder(nn.Module):
    """Any module, with the outputs of some of its submodules as features.

    Args:
        module: returns logits, or an object whose attribute `logits` is used, such as Outputs or those of transformers.
            Its weights stay its own.
        stages: names of submodules, shallow to deep, as in `module.named_modules()`; they return maps or tokens.
        attentions: names of attention modules: `nn.MultiheadAttention` (torchvision), timm's, or any that return maps
            `[batch, heads, tokens, tokens]`, alone or last in a tuple, as those of transformers do with
            `attn_implementation="eager"`. The first two compute the maps explicitly while they are recorded, the first
            after its dropout, in training.

    Raises:
        ValueError: something else than a module or names; a submodule does not exist: the nearest name is offered.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        >>> [tuple(f.shape) for f in Recorder(network, ("0",))(torch.zeros(2, 3, 4, 4)).features]
        [(2, 4, 2, 2)]
    """

    def __init__(self, module: nn.Module, stages: Sequence[str], attentions: Sequence[str] = ()) -> None:
        super().__init__()
        _check_module("module", module)
        for option, names in (("stages", stages), ("attentions", attentions)):
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"`{option}` must be a tuple of names of submodules, got {names!r}.")
        known = dict(module.named_modules())
        for name in (*stages, *attentions):
            if not name or name not in known:
                raise ValueError(f"the module has no submodule {shown(name)}.{nearest(name, [n for n in known if n])}")
        self.module, self.stages, self.attentions = module, tuple(stages), tuple(attentions)

    def forward(self, images: Tensor) -> Outputs:
        """The module's logits, the recorded outputs and the images.

        Raises:
            ValueError: a submodule was not called, or returned something else than a tensor.
        """
        known = dict(self.module.named_modules())
        values: dict[nn.Module, Any] = {}

        def keep(part: nn.Module, _: Any, output: Any) -> None:
            values[part] = output

        with (
            hooked([known[name] for name in self.stages], after=keep),
            called_attention([known[name] for name in self.attentions]) as maps,
        ):
            logits = self.module(images)
        features = tuple(_tensor(name, values.get(known[name])) for name in self.stages)
        attentions = tuple(_tensor(name, maps.get(known[name])) for name in self.attentions)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the module must return logits, or an object with them as its attribute `logits`, got "
                f"{type(logits).__name__}. Wrap it in a module that does."
            )
        return Outputs(logits, features, attentions, images)

    def gradients(self, images: Tensor, labels: Tensor) -> Outputs:
        """The logits, and as the only feature the gradient of each sample's cross-entropy with respect to its image.

        For `AttentionTransfer(pool="gradient", reduction="paper")`. The gradient has a graph to the module's weights
        if any of them is trained: the loss differentiates it again.

        Args:
            images: `[batch, channels, height, width]`.
            labels: `[batch]`.

        Raises:
            ValueError: labels that are no class numbers.
        """
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self(images).logits
            labels = check_labels("the gradients", labels, logits)
            total = F.cross_entropy(logits, labels, reduction="sum")  # samples do not see each other
            trained = any(p.requires_grad for p in self.parameters())
            (gradient,) = torch.autograd.grad(total, images, create_graph=trained)
        return Outputs(logits, (gradient,), images=images.detach())


def _check_module(option: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"`{option}` must be a torch.nn.Module, got {type(module).__name__}.")


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        kind = "was not called" if value is None else f"returned a {type(value).__name__}, not a tensor"
        raise ValueError(f"the submodule {name!r} {kind}. Name a module that the network calls and that returns a map.")
    return value


@final
class Guide(nn.Module):
    """The sum of losses in a loop of one's own, with all duties of the loop: see docs/own_loop.md.

    It counts the steps; from them follow the losses' schedule stages and progress. Its `state_dict` holds both.

    Args:
        terms: pairs of weight and loss, as in `Objective`.
        student: the module that is trained.
        steps: number of steps of the training, at least 1.

    Raises:
        ValueError: terms as in `Objective`, or fewer than one step.
    """

    taken: Tensor

    def __init__(self, terms: Sequence[tuple[float, Spec | Loss | str]], *, student: nn.Module, steps: int) -> None:
        super().__init__()
        _check_module("student", student)
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        self.objective, self.steps, self._student = Objective(terms), steps, [student]  # a list: no submodule
        self.restarts = self.objective.restarts(steps)
        self.taken = nn.Buffer(Tensor([0]).long()[0])

    def prepare(self, student: Outputs, teacher: Outputs, *, learning_rate: float) -> list[dict[str, Any]]:
        """Build the learnable parts from one batch; their parameter groups, for the optimizer beside the student's.

        Args:
            student: the student's outputs.
            teacher: the teacher's.
            learning_rate: the run's; discriminators get at most their own.
        """
        self.objective.prepare(student.detach(), teacher)
        rates: dict[nn.Parameter, float] = {}
        for loss in self.objective.losses.values():
            assert isinstance(loss, Loss)
            for name, largest in loss.discriminator_rates.items():
                rates |= dict.fromkeys(loss.get_submodule(name).parameters(), min(learning_rate, largest))
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups.setdefault(rates.get(parameter, learning_rate), []).append(parameter)
        return [{"params": members, "lr": rate} for rate, members in groups.items()]

    @property
    def is_restart(self) -> bool:
        """Whether a schedule stage begins with this step: the optimizer should forget its momentum."""
        return int(self.taken) in self.restarts

    def backward(
        self, student: Outputs, teacher: Outputs, labels: Tensor, *, ids: Tensor | None = None
    ) -> dict[str, float]:
        """Backward of all losses of this step, discriminators' too; call the optimizer after it, once.

        Args:
            student: the student's outputs, with their graph.
            teacher: the teacher's.
            labels: `[batch]`.
            ids: `[batch]`, the samples' indices in the data set, for losses with a memory.

        Returns:
            The values by name; `sum` is that of the losses that are not clipped.
        """
        at = Moment(min(1.0, int(self.taken) / self.steps), ids=ids)
        values = {}
        for name, loss in self.objective.teach("sum", student, teacher, labels, at, learner=self._student[0]):
            loss.backward()
            values[name] = float(loss.detach())
        self.taken += 1
        return values
