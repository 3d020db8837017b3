"""A small, exactly reproducible batch on which every loss has a golden value."""

import torch
from torch import Tensor, nn

from kdnas.losses.base import Loss
from kdnas.outputs import Outputs


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Float64 numbers of unit scale, equal in every torch build: sin(0.7 k + k^2/97 + phase)."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * k + k * k / 97 + phase).reshape(shape)


def attention(*shape: int, phase: float = 0.0) -> Tensor:
    """Attention maps from `wave`, with rows that sum to 1."""
    return wave(*shape, phase=phase).softmax(-1)


def example(batch: int = 4, classes: int = 5, *, dense: bool = False) -> tuple[Outputs, Outputs, Tensor]:
    """Student outputs, teacher outputs and labels.

    Two stages each: student maps of 3 and 6 channels, teacher maps of 4 and 8, both 8x6 and 4x3;
    attention maps of 2 and 4 heads over 5 tokens. Dense logits and labels are 4x3 maps.
    """
    grid = (4, 3) if dense else ()
    student = Outputs(
        2 * wave(batch, classes, *grid),
        (wave(batch, 3, 8, 6, phase=1), wave(batch, 6, 4, 3, phase=2)),
        (attention(batch, 2, 5, 5, phase=3),),
        wave(batch, 3, 16, 12, phase=4),
    )
    teacher = Outputs(
        3 * wave(batch, classes, *grid, phase=5),
        (wave(batch, 4, 8, 6, phase=6), wave(batch, 8, 4, 3, phase=7)),
        (attention(batch, 4, 5, 5, phase=8),),
        student.images,
    )
    labels = torch.arange(torch.Size((batch, *grid)).numel()).reshape(batch, *grid) % classes
    return student, teacher, labels


def gates() -> tuple[Tensor, ...]:
    """Channel scale factors of two layers, of 3 and 5 channels."""
    return wave(3), wave(5, phase=1)


def fill(module: nn.Module) -> nn.Module:
    """Set every parameter of a module from `wave`, scaled by 1/sqrt(fan in), and return the module.

    The parts of a loss count as trained afterwards.

    Convert the module to float64 first: a float32 parameter loses digits.
    """
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.copy_(wave(*parameter.shape, phase=index) / fan_in**0.5)
    for loss in module.modules():
        if isinstance(loss, Loss):
            loss.mark_trained()
    return module
