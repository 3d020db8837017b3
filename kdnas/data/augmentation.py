"""Random augmentation of training images; the generator is an argument."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["none", "shift", "crop_flip", "strong_shift", "strong_crop_flip"]


def augment(pixels: Tensor, kind: Augmentation, rng: torch.Generator) -> Tensor:
    """Random shifts by up to an eighth of the size, mirroring and distortion, depending on the kind; per image."""
    if kind == "none":
        return pixels
    count, _, height, width = pixels.shape
    pad = max(1, height // 8)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=rng)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if kind in ("crop_flip", "strong_crop_flip"):
        mirrored = torch.rand(count, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    cropped = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    shifted = cropped.permute(0, 3, 1, 2).contiguous()
    return distorted(shifted, rng) if kind.startswith("strong") else shifted


def distorted(pixels: Tensor, rng: torch.Generator, num_operations: int = 2) -> Tensor:
    """Each image after `num_operations` random operations of six, each with a random strength.

    Brightness or contrast times 0.4 to 1.6, blended with grey by up to 1, solarised above 0.4 to 1, posterised to 2 to
    6 bits, or a square of up to half the side cut out. Pixels stay in [0, 1].

    Reference: Cubuk et al., RandAugment, CVPR 2020 Workshops: operations drawn uniformly.
    Differs: no rotation or shear, and the strength is random instead of fixed.
    """
    count, _, height, width = pixels.shape
    for _ in range(num_operations):
        operation = torch.randint(0, 6, (count,), generator=rng)
        strength, across, down = torch.rand(3, count, 1, 1, 1, generator=rng)
        factor, mean = 0.4 + 1.2 * strength, pixels.mean((2, 3), keepdim=True)
        levels = 2.0 ** (2 + (4 * strength).round()) - 1
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        side = strength / 2
        hole = ((rows / height - across).abs() < side / 2) & ((columns / width - down).abs() < side / 2)
        results = (
            pixels * factor,
            mean + (pixels - mean) * factor,
            pixels + strength * (pixels.mean(1, keepdim=True) - pixels),
            torch.where(pixels > 0.4 + 0.6 * strength, 1 - pixels, pixels),
            (pixels * levels).round() / levels,
            pixels.masked_fill(hole, 0.5),
        )
        for index, changed in enumerate(results):
            pixels = torch.where((operation == index)[:, None, None, None], changed, pixels)
        pixels = pixels.clamp(0, 1)
    return pixels
