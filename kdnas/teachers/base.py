"""Teachers: frozen networks, always in evaluation mode, each with its own preprocessing."""

import abc
from collections.abc import Mapping, Sequence
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdnas.data.base import prepare
from kdnas.network import Network
from kdnas.outputs import END, Moment, Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.specs import nearest
from kdnas.teachers.stages import as_feature, check_logits, find_stages, logits_of, plain_module, recorded


class Teacher(nn.Module, abc.ABC):
    """Maps pixels in [0, 1] to Outputs, without a graph.

    Its parameters are frozen, `train()` leaves it in evaluation mode, and its weights are not part of a checkpoint.

    Attributes:
        class_names: one per logit; None if unknown.
        assumes_size: whether nobody said the size of its images, so that it gets the data's.
    """

    class_names: tuple[str, ...] | None = None
    assumes_size: bool = False

    @final
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)

    @final
    def freeze(self) -> Self:
        """Evaluation mode, no gradients; called at the end of a constructor."""
        return self.requires_grad_(False).train(False)

    @final
    def forward(self, pixels: Tensor, labels: Tensor | None = None, at: Moment = END) -> Outputs:
        """Logits `[batch, classes]` and one feature map per stage.

        Args:
            pixels: `[batch, channels, height, width]` in [0, 1].
            labels: `[batch]`, or None if unknown.
            at: where in the student's training, for teachers that change with it; outside a training its end.
        """
        with torch.no_grad():
            return self.teach(pixels, labels, at)

    @abc.abstractmethod
    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The teacher's outputs; for subclasses.

        Args:
            pixels: `[batch, channels, height, width]` in [0, 1].
            labels: `[batch]` or None, for teachers whose outputs depend on them.
            at: where in the student's training.
        """


@final
class Frozen(Teacher):
    """Any network as a teacher.

    Args:
        module: returns logits, alone or among other outputs (see `logits_of`), or Outputs. Of a compiled or parallel
            module the one inside is used. A TorchScript module shows no feature maps.
        preprocessing: the network's image size and normalisation, applied to the pixels here: teacher and student get
            the same augmented pixels, each in its own way.
        stages: names of submodules whose outputs are the features. By default a Network's stages, else those that
            `find_stages` finds; none for losses and scorers of logits alone.
        classes: number of classes, which tells the logits among several outputs.

    Raises:
        ValueError: a stage that does not exist (the message suggests the nearest name), a module that fails on images
            of this size, or a TorchScript module without `stages=()`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        stages: Sequence[str] | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        empty = next((n for n, p in module.named_parameters() if is_lazy(p) or p.is_meta), None)
        if empty is not None:
            raise ValueError(f"the teacher's parameter {empty} has no values yet. Run or load it before you return it.")
        self.module, self.preprocessing, self.classes = plain_module(module), preprocessing, classes
        try:
            self.freeze()
        except NotImplementedError as error:
            raise ValueError(
                f"the teacher must have an evaluation mode, a {type(module).__name__} has none ({error}) Pass the "
                "Python module that it was made from."
            ) from error
        if isinstance(module, torch.jit.ScriptModule) and (stages is None or stages):
            raise ValueError(
                "a TorchScript module shows no feature maps. Pass the Python module that it was made from, or "
                "Frozen(module, preprocessing=..., stages=()) for losses and scorers of logits alone."
            )
        if stages is None:
            stages = (
                () if isinstance(self.module, Network) else find_stages(self.module, self._probe(), classes=classes)
            )
        known = dict(self.module.named_modules())
        for name in stages:
            if name not in known:
                raise ValueError(f"the teacher has no submodule {name!r}.{nearest(name, known)}")
        self.stages = tuple(stages)

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """Logits and the named stages' maps."""
        images = prepare(pixels, self.preprocessing)
        if isinstance(self.module, Network) and not self.stages:
            return self.module(images)
        with recorded(self.module, self.stages, batch=len(images)) as outputs:
            returned = self.module(images.to(self._dtype(), copy=True))  # it may write into them
        if isinstance(returned, Outputs) and not isinstance(self.module, Network):
            return returned
        features = tuple(self._feature(name, outputs, images) for name in self.stages)
        if isinstance(returned, Outputs):
            return returned._replace(features=features)
        logits = logits_of(returned, self.classes)
        check_logits(logits, len(images), type(self.module).__name__)
        return Outputs(logits, features, images=images)

    def _feature(self, name: str, outputs: Mapping[str, Tensor], images: Tensor) -> Tensor:
        if name not in outputs:
            raise ValueError(f"the stage {name!r} of the teacher returned no tensor. Name another submodule.")
        feature = as_feature(self.module.get_submodule(name), outputs[name], images.shape)
        if feature is None:
            raise ValueError(
                f"the stage {name!r} of the teacher must return a map or tokens, got shape "
                f"{tuple(outputs[name].shape)}. Name another submodule."
            )
        return feature.float()

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def _probe(self) -> Tensor:
        p, parameter = self.preprocessing, next(self.module.parameters(), torch.zeros(()))
        return torch.zeros(2, len(p.mean), p.height, p.width, device=parameter.device, dtype=self._dtype())


def every_layer(teacher: Teacher) -> Teacher:
    """The same teacher, with the output of every layer (block) as features instead of one map per stage.

    The layers of a Network are those of its stages. Of another network the layers are the outermost modules inside an
    `nn.Sequential` or `nn.ModuleList` that have submodules and return maps or tokens, in order of execution: the blocks
    of torchvision's and timm's networks. If there are fewer than two, the features stay those of the stages.

    Raises:
        ValueError: the teacher is made of several networks.
    """
    if not isinstance(teacher, Frozen):
        raise ValueError(
            f"features of every layer need a teacher of one network, got a {type(teacher).__name__}. Name one by "
            "--teacher, for example checkpoint:RUN/teacher."
        )
    module = teacher.module
    if isinstance(module, Network):
        names = [f"stages.{i}.{j}" for i, stage in enumerate(module.stages) for j in range(len(stage))]  # type: ignore[arg-type]
    else:
        names = _blocks(module, teacher._probe())
    stages = names if len(names) >= 2 else None
    return Frozen(module, preprocessing=teacher.preprocessing, stages=stages, classes=teacher.classes)


def _blocks(module: nn.Module, images: Tensor) -> list[str]:
    candidates: list[str] = []
    for path, part in module.named_modules():
        if isinstance(part, nn.Sequential | nn.ModuleList) and not any(
            path.startswith(f"{name}.") for name in candidates
        ):
            prefix = f"{path}." if path else ""
            candidates += [prefix + name for name, child in part.named_children() if any(child.children())]
    with recorded(module, candidates) as outputs, torch.no_grad():
        module(images)
    return [n for n, map_ in outputs.items() if map_.dim() == 3 or (map_.dim() == 4 and map_[0, 0].numel() > 1)]
