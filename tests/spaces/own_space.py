"""A search space of ordinary PyTorch blocks: residual stages with choices of width, depth and kernel."""

from dataclasses import dataclass

from torch import Tensor, nn

from kdnas.architecture import Architecture, Choice
from kdnas.space import KernelOptions, Layer, SearchSpace, SizeOptions, layer


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, 1, kernel // 2, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` to `[batch, outputs, h / stride, w / stride]`."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


@dataclass(frozen=True, kw_only=True)
class Own(SearchSpace):
    """Three stages; every stage but the first halves the resolution. The fields are the keys of the table."""

    widths: SizeOptions = (8, 16, 24)
    depths: SizeOptions = (1, 2)
    kernels: KernelOptions = (3, 5)

    @property
    def structure(self) -> tuple[Choice, ...]:
        """The choices; a block's kernel exists only while the stage has the block."""
        choices = []
        for i in range(3):
            choices += [Choice(f"stage{i}.width", self.widths), Choice(f"stage{i}.depth", self.depths)]
            for j in range(max(self.depths)):
                choices.append(Choice(f"stage{i}.block{j}.kernel", self.kernels, f"stage{i}.depth", j + 1))
        return tuple(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head: classes and their arguments; nothing is built."""
        stem = layer(nn.Conv2d, in_channels=self.image_channels, out_channels=8, kernel_size=3, padding=1)
        width, stages = 8, []
        for i in range(3):
            stage, blocks = architecture.under(f"stage{i}"), []
            for j in range(stage.integer("depth")):
                outputs, kernel = stage.integer("width"), stage.integer(f"block{j}.kernel")
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(layer(Residual, inputs=width, outputs=outputs, kernel=kernel, stride=stride))
                width = outputs
            stages.append(tuple(blocks))
        return stem, tuple(stages), layer("kdnas.blocks.basic:PoolLinear", inputs=width, classes=self.classes)
