"""A blueprint as an ordinary PyTorch network."""

from typing import final

from torch import Tensor, nn

from kdnas.blocks.basic import resize
from kdnas.outputs import Outputs
from kdnas.space import Blueprint, Layer


def build(layer: Layer) -> nn.Module:
    """The layer's module.

    Raises:
        ValueError: the layer's class cannot be imported or called so.
    """
    return layer.make.build(nn.Module)


@final
class Network(nn.Module):
    """Stem, stages, head. A student is one of these, and so is a teacher trained here.

    Images of another size than the blueprint's are resized (bicubic, antialiased).
    """

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.stem = build(blueprint.stem)
        self.stages = nn.ModuleList(nn.Sequential(*map(build, stage)) for stage in blueprint.stages)
        self.head = build(blueprint.head)

    def forward(self, images: Tensor) -> Outputs:
        """Logits `[batch, classes]` and one feature map per stage."""
        x, features = self.stem(resize(images, *self.blueprint.image[1:])), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return Outputs(self.head(x), tuple(features), images=images)

    def plain(self) -> nn.Sequential:
        """The same modules as a Sequential from images to logits, for every tool outside."""
        return nn.Sequential(self.stem, *self.stages, self.head)
