"""Teachers: frozen networks, always in evaluation mode, each with its own preprocessing."""

import abc
import copy
import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdnas.blocks.basic import enlarge
from kdnas.compilation import compiled
from kdnas.data.base import Data, prepare
from kdnas.losses.attention_layers import called_attention, find_attention
from kdnas.network import Network, hooked
from kdnas.outputs import END, Moment, Outputs, embedding
from kdnas.preprocessing import Preprocessing
from kdnas.specs import Spec, nearest, resolve
from kdnas.teachers.stages import (
    as_feature,
    check_logits,
    classified_map,
    features_of,
    find_classifier,
    find_stages,
    logits_of,
    plain_module,
    recorded,
)
from kdnas.values import shown


class Teacher(nn.Module, abc.ABC):
    """Maps pixels in [0, 1] to Outputs, without a graph.

    Its parameters are frozen, `train()` leaves it in evaluation mode, and its weights are not part of a checkpoint.

    Attributes:
        class_names: one per logit; None if unknown.
        assumes_size: whether nobody said the size of its images, so that it gets the data's.
        note: what is worth knowing of its origin, in words; empty for nothing.
    """

    class_names: tuple[str, ...] | None = None
    assumes_size: bool = False
    note: str = ""

    @final
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)

    @final
    def freeze(self) -> Self:
        """Evaluation mode, no gradients; called at the end of a constructor."""
        return self.requires_grad_(False).train(False)

    def with_attentions(self) -> "Teacher":
        """The same teacher, with the maps of its attention layers among its outputs, where it can show any."""
        return self

    @final
    def forward(self, pixels: Tensor, labels: Tensor | None = None, at: Moment = END) -> Outputs:
        """Logits `[batch, classes]` and one feature map per stage, on the device of the pixels.

        It computes where its weights are.

        Args:
            pixels: `[batch, channels, height, width]` in [0, 1].
            labels: `[batch]`, or None if unknown.
            at: where in the student's training, for teachers that change with it; outside a training its end.
        """
        tensors = itertools.chain(self.parameters(), self.buffers())
        home = next((tensor.device for tensor in tensors), pixels.device)
        labels = None if labels is None else labels.to(home)
        with torch.no_grad():
            return self.teach(pixels.to(home), labels, at).map(lambda tensor: tensor.to(pixels.device))

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
        classes: number of classes, which tells the logits among several outputs; 0 for a network without classes,
            whose features (see `features_of`) stand in their place.
        crop: share of the images' sides that the module sees, around their centre; above 0, 1 for all.
        batch: number of images in every call of a module that takes no other; 0 for any.
        dense: whether the logits are maps, which are enlarged to the pixels' height and width (bilinear); by default
            as the blueprint of a Network says.

    Attributes:
        columns: the places among the module's logits of those that it gives, in their order; empty for all of them.
        classifier: the linear layer whose input stands in the logits' place, empty for the last stage's map; None for
            the logits themselves.
        position_classifier: where the logits are maps, the layer that classifies every position, whose input is
            `Outputs.classified`; empty where `find_classifier` finds none.

    Raises:
        ValueError: a stage that does not exist (the message suggests the nearest name), a module that fails on images
            of this size, a TorchScript module without `stages=()`, or a share that is none.
    """

    columns: tuple[int, ...] = ()
    classifier: str | None = None
    attentions: tuple[str, ...] = ()
    position_classifier: str = ""

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        stages: Sequence[str] | None = None,
        classes: int | None = None,
        crop: float = 1.0,
        batch: int = 0,
        dense: bool | None = None,
    ) -> None:
        super().__init__()
        if not 0 < crop <= 1:
            raise ValueError(f"`crop` must be above 0 and at most 1, got {crop}.")
        empty = next((n for n, p in module.named_parameters() if is_lazy(p) or p.is_meta), None)
        if empty is not None:
            raise ValueError(f"the teacher's parameter {empty} has no values yet. Run or load it before you return it.")
        self.module, self.preprocessing, self.classes = plain_module(module), preprocessing, classes
        self.crop, self.batch = crop, batch
        known = isinstance(self.module, Network) and self.module.blueprint.dense
        self.dense = known if dense is None else dense
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
                raise ValueError(f"the teacher has no submodule {shown(name)}.{nearest(name, known)}")
        self.stages = tuple(stages)
        if self.dense and not isinstance(self.module, Network):
            self.position_classifier = find_classifier(self.module, self._probe(), classes)

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """Logits, the named stages' maps, and those of the named attention layers."""
        images = self._images(pixels)
        outputs = self._batched(images) if self.batch else self._outputs(images)
        return outputs._replace(logits=enlarge(outputs.logits, pixels)) if self.dense else outputs

    def _batched(self, images: Tensor) -> Outputs:
        """The outputs of a module that takes one number of images."""
        # The last batch is filled with copies of its last image.
        filled = torch.cat([images, images[-1:].expand(-len(images) % self.batch, -1, -1, -1)])
        parts = [self._outputs(part) for part in filled.split(self.batch)]
        return _joined(parts).map(lambda tensor: tensor[: len(images)])

    def with_attentions(self) -> Teacher:
        """The same teacher, with the maps of its attention layers among its outputs, where it can show any."""
        if isinstance(self.module, Network):
            return self  # which always shows them
        return self._with(attentions=find_attention(self.module, self._probe()))

    def without_classifier(self) -> "Frozen":
        """The same teacher, giving the features that its classifier gets in the place of logits.

        The classifier is the linear layer whose output are the logits; without one, the last stage's map is averaged
        over positions.

        Raises:
            ValueError: it has neither.
        """
        linear = [name for name, part in self.module.named_modules() if isinstance(part, nn.Linear)]
        probe = self._probe()
        with recorded(self.module, linear, batch=len(probe)) as values, torch.no_grad():
            logits = self._shown(probe).logits
        names = [name for name in values if torch.equal(values[name].float(), logits)]
        if not names and not self._shown(probe).features:
            raise ValueError(
                f"the teacher {type(self.module).__name__} must have a linear classifier or feature maps, to give "
                "features without classes. Return a module that gives features."
            )
        return self._with(classifier=names[-1] if names else "", dense=False)

    def _with(self, **attributes: Any) -> "Frozen":
        """A copy that shares the module, with some attributes changed."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def _images(self, pixels: Tensor) -> Tensor:
        """The module's input."""
        own = self.preprocessing
        if self.crop == 1:
            return prepare(pixels, own)
        large = replace(own, height=round(own.height / self.crop), width=round(own.width / self.crop))
        top, left = (large.height - own.height) // 2, (large.width - own.width) // 2
        return prepare(pixels, large)[..., top : top + own.height, left : left + own.width]

    def _outputs(self, images: Tensor) -> Outputs:
        if not self.classifier:
            outputs = self._shown(images)
            return outputs if self.classifier is None else outputs._replace(logits=embedding(outputs))
        inputs: list[Tensor] = []
        layer = self.module.get_submodule(self.classifier)
        with hooked([layer], before=lambda _, values: inputs.append(values[0])):
            outputs = self._shown(images)
        return outputs._replace(logits=features_of(inputs[-1]))

    def _shown(self, images: Tensor) -> Outputs:
        """What the module shows of itself."""
        if isinstance(self.module, Network) and not self.stages:
            return self._chosen(self.module(images))
        layers = {name: self.module.get_submodule(name) for name in self.attentions}
        with (
            recorded(self.module, self.stages, batch=len(images)) as outputs,
            called_attention(list(layers.values())) as maps,
            classified_map(self.module, self.position_classifier) as classified,
            nullcontext() if isinstance(self.module, Network) else compiled(self.module),
        ):
            returned = self.module(images.to(self._dtype(), copy=True))  # it may write into them
        if isinstance(returned, Outputs) and not isinstance(self.module, Network):
            return self._chosen(returned)
        features = tuple(self._feature(name, outputs, images) for name in self.stages)
        if isinstance(returned, Outputs):
            return self._chosen(returned._replace(features=features))
        logits = features_of(returned) if self.classes == 0 else logits_of(returned, self.classes, dense=self.dense)
        check_logits(logits, len(images), type(self.module).__name__, dense=self.dense)
        attentions = tuple(maps[layer].float() for layer in layers.values())
        last = classified[-1].float() if classified else None
        return self._chosen(Outputs(logits, features, attentions, images, classified=last))

    def _chosen(self, outputs: Outputs) -> Outputs:
        """The same with the logits of the chosen classes."""
        return outputs._replace(logits=outputs.logits[:, list(self.columns)]) if self.columns else outputs

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
        return torch.zeros(
            self.batch or 2, len(p.mean), p.height, p.width, device=parameter.device, dtype=self._dtype()
        )


def teacher_of(source: Spec, data: Data) -> Teacher:
    """The teacher of a spec for a data set: of its classes, or of features where the data's task has none.

    Raises:
        ValueError: as its maker; or it answers for whole images and the task is about pixels, or the other way round.
    """
    if not data.task.has_classes:
        return made_for(source, 0, data.preprocessing)
    teacher = made_for(source, data.classes, data.preprocessing, data.class_names, dense=data.task.dense)
    if any(module.dense != data.task.dense for module in teacher.modules() if isinstance(module, Frozen)):
        kinds = "whole images", "every pixel"
        raise ValueError(
            f"the teacher must give logits for {kinds[data.task.dense]}, as the task {data.task.name} needs, got one "
            f"for {kinds[not data.task.dense]}."
        )
    return teacher


def made_for(
    source: Spec,
    classes: int,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] = (),
    *,
    dense: bool = False,
) -> Teacher:
    """The teacher of a spec for so many classes.

    Args:
        source: its maker.
        classes: number of the data's classes; 0 for a teacher of features, whose vectors stand in the logits' place.
        preprocessing: the data's.
        class_names: the data's, for makers that have this argument.
        dense: whether it must answer for every pixel, for makers that have this argument.
    """
    options = {"class_names": class_names, "dense": dense}
    known = signature(resolve(source.make)).parameters
    options = {name: value for name, value in options.items() if name in known}
    return source.build(Teacher, classes=classes, preprocessing=preprocessing, **options)


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
    return teacher._with(stages=tuple(names)) if len(names) >= 2 else teacher


def _joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of several batches as those of one."""
    maps = [(part.features, part.attentions) for part in parts]
    features, attentions = (tuple(map(torch.cat, zip(*kind, strict=True))) for kind in zip(*maps, strict=True))
    images, classified = (
        torch.cat([value for value in values if value is not None]) if values[0] is not None else None
        for values in ([part.images for part in parts], [part.classified for part in parts])
    )
    return Outputs(torch.cat([part.logits for part in parts]), features, attentions, images, classified=classified)


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
