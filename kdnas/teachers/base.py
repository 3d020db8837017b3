"""Teachers: frozen networks, always in evaluation mode, each with its own preprocessing."""

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import resize
from kdnas.data.base import normalise
from kdnas.network import Network, hooked
from kdnas.outputs import END, Moment, Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.specs import nearest


class Teacher(nn.Module, abc.ABC):
    """Maps pixels in [0, 1] to Outputs, without a graph.

    Its parameters are frozen, `train()` leaves it in evaluation mode, and its weights are not part of a checkpoint.

    Attributes:
        class_names: one per logit; None if unknown.
    """

    class_names: tuple[str, ...] | None = None

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
        module: returns logits, or Outputs.
        preprocessing: the network's image size and normalisation, applied to the pixels here: teacher and student get
            the same augmented pixels, each in its own way.
        stages: names of submodules whose outputs are the features. By default a Network's stages, else the last map at
            each resolution, or four transformer blocks evenly spread, as one pass over a blank image shows.

    Raises:
        ValueError: a stage that does not exist; the message suggests the nearest name.
    """

    def __init__(self, module: nn.Module, *, preprocessing: Preprocessing, stages: Sequence[str] | None = None) -> None:
        super().__init__()
        self.module, self.preprocessing = module, preprocessing
        self.freeze()
        if stages is None:
            stages = () if isinstance(module, Network) else find_stages(module, self._probe())
        known = dict(module.named_modules())
        for name in stages:
            if name not in known:
                raise ValueError(f"the teacher has no submodule {name!r}.{nearest(name, known)}")
        self.stages = tuple(stages)

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """Logits and the named stages' maps."""
        images = normalise(resize(pixels, self.preprocessing.height, self.preprocessing.width), self.preprocessing)
        if isinstance(self.module, Network) and not self.stages:
            return self.module(images)
        with recorded(self.module, self.stages) as maps:
            outputs = self.module(images)
        features = tuple(maps[name] for name in self.stages)
        if isinstance(outputs, Outputs):
            return outputs._replace(features=features) if isinstance(self.module, Network) else outputs
        return Outputs(outputs, features, images=images)

    def _probe(self) -> Tensor:
        p = self.preprocessing
        return torch.zeros(2, len(p.mean), p.height, p.width)


@contextmanager
def recorded(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules inside, by name, in order of their first call; of several calls the last output."""
    known = dict(module.named_modules())
    names_of = {known[name]: name for name in names}
    outputs: dict[str, Tensor] = {}

    def keep(part: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[names_of[part]] = output

    with hooked(names_of, after=keep):
        yield outputs


def find_stages(module: nn.Module, images: Tensor, most: int = 6) -> tuple[str, ...]:
    """The submodules whose outputs are the last at their resolution; for a transformer four blocks, evenly spread.

    Raises:
        ValueError: the module fails on these images, or no submodule returns maps or tokens.
    """
    names = [name for name, _ in module.named_modules() if name]
    with recorded(module, names) as outputs, torch.no_grad():
        try:
            module(images)
        except RuntimeError as error:
            _, *image = images.shape
            raise ValueError(
                f"the teacher must accept images of {' x '.join(map(str, image))}, but it fails on them "
                f"({str(error).splitlines()[0]}). Use a teacher for this data's images."
            ) from error
    maps = [n for n, map_ in outputs.items() if map_.dim() == 4 and map_.shape[2] * map_.shape[3] > 1]
    by_size: dict[tuple[int, ...], str] = {}
    for name in maps:
        by_size[tuple(outputs[name].shape[2:])] = name
    if len(by_size) >= 2:
        return tuple(by_size.values())[-most:]
    tokens = [n for n in outputs if outputs[n].dim() == 3]
    depths = {n.count(".") for n in tokens}
    for depth in sorted(depths):
        level = [n for n in tokens if n.count(".") == depth]
        if len(level) >= 4:
            return tuple(level[(i + 1) * len(level) // 4 - 1] for i in range(4))
    if maps or tokens:
        return tuple((maps or tokens)[-1:])
    raise ValueError(
        "no submodule of the teacher returns a feature map or tokens. Name its stages, or use losses of logits only."
    )


def every_layer(teacher: Teacher) -> Teacher:
    """The same teacher, with the output of every layer (block) as features instead of one map per stage.

    The layers of a Network are those of its stages. Of another network the layers are the outermost modules inside an
    `nn.Sequential` that have submodules and return maps or tokens, in order of execution: the blocks of
    torchvision's and timm's networks. If there are fewer than two, the features stay those of the stages.

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
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        names = _blocks(module, teacher._probe().to(device))
    return Frozen(module, preprocessing=teacher.preprocessing, stages=names if len(names) >= 2 else None)


def _blocks(module: nn.Module, images: Tensor) -> list[str]:
    candidates: list[str] = []
    for path, part in module.named_modules():
        if isinstance(part, nn.Sequential) and not any(path.startswith(f"{name}.") for name in candidates):
            prefix = f"{path}." if path else ""
            candidates += [prefix + name for name, child in part.named_children() if any(child.children())]
    with recorded(module, candidates) as outputs, torch.no_grad():
        module(images)
    return [n for n, map_ in outputs.items() if map_.dim() == 3 or (map_.dim() == 4 and map_[0, 0].numel() > 1)]
