"""An image classifier as plain PyTorch code, written by kdnas; it needs torch alone.

    from student import load

    student = load("weights.safetensors")
    logits = student(images)

Images are `[batch, 1, 8, 8]` with values in [0, 1]; they are normalised inside. The
names in the file are those of `Student().state_dict()`.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASS_NAMES = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


# kdnas.blocks.basic
class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, activation; `none` leaves the activation out.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: odd kernel size; padded to keep the resolution.
        stride: stride.
        groups: groups of the convolution.
        activation: `relu`, `swish`, `hswish` or `none`.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, activation: str = "relu"
    ) -> None:
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([] if activation == "none" else [activation_named(activation)]))


class PoolLinear(nn.Module):
    """Global average pooling, dropout, linear classifier: the usual head."""

    def __init__(self, inputs: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, classes]`."""
        return self.linear(self.dropout(x.mean((2, 3))))


def activation_named(name: str) -> nn.Module:
    """The activation layer of that name."""
    activations = {"relu": nn.ReLU, "swish": nn.SiLU, "hswish": nn.Hardswish, "gelu": nn.GELU}
    if name not in activations:
        raise ValueError(f"`activation` must be one of {', '.join(sorted(activations))}, none, got {name!r}.")
    return activations[name]()


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images `[batch, channels, h, w]` resized to `[batch, channels, height, width]`; of that size, unchanged."""
    if images.shape[2] == height and images.shape[3] == width:
        return images
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


class Student(nn.Module):
    """Images `[batch, 1, 8, 8]` with values in [0, 1] to logits `[batch, 10]`."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.307491]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.377136]).view(-1, 1, 1), persistent=False)
        self.stem = ConvNormAct(inputs=1, outputs=4, kernel=3, stride=1)
        self.stages = nn.Sequential(
            nn.Sequential(
                ConvNormAct(inputs=4, outputs=4, kernel=3, stride=1),
                ConvNormAct(inputs=4, outputs=4, kernel=3, stride=1),
            ),
            nn.Sequential(
                ConvNormAct(inputs=4, outputs=4, kernel=3, stride=2),
                ConvNormAct(inputs=4, outputs=8, kernel=3, stride=1),
            ),
        )
        self.head = PoolLinear(inputs=8, classes=10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; images of another size are resized."""
        x = (resize(images, 8, 8) - self.mean) / self.std
        return self.head(self.stages(self.stem(x)))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: the length of its header in eight bytes, the header in JSON, the numbers."""
    content = bytearray(Path(path).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        entries = {k: v for k, v in json.loads(content[8:end]).items() if k != "__metadata__"}
        tensors = {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            dtype = {"F32": torch.float32, "I64": torch.int64}[entry["dtype"]]
            numbers = bytearray(content[end + first : end + last]) or bytearray(8)
            tensors[name] = torch.frombuffer(numbers, dtype=dtype)[: math.prod(entry["shape"])].reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file of this student.") from error
    return tensors


def load(path: str | Path) -> Student:
    """The student with the weights of a safetensors file, in eval mode."""
    student = Student()
    student.load_state_dict(read_weights(path), strict=True)
    return student.eval()


def main(arguments: list[str]) -> None:
    """Print the network, or the class and its probability for each image of a tensor that torch.save wrote."""
    student = load(Path(__file__).with_name("weights.safetensors"))
    if not arguments:
        print(student)
        print(f"{sum(p.numel() for p in student.parameters()):,} parameters, {len(CLASS_NAMES)} classes")
        return
    with torch.inference_mode():
        best = student(torch.load(arguments[0], weights_only=True)).softmax(1).max(1)
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{CLASS_NAMES[index]} {probability:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
