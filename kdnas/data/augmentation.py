"""Random augmentation of training images; the generator is an argument."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["none", "shift", "crop_flip", "strong_shift", "strong_crop_flip"]


EVERY = slice(None)


def augment(
    pixels: Tensor, kind: Augmentation, rng: torch.Generator, part: slice = EVERY, total: int | None = None
) -> Tensor:
    """Random shifts by up to an eighth of the size, mirroring and distortion, depending on the kind; per image.

    Args:
        pixels: `[count, channels, height, width]` in [0, 1].
        kind: which of these.
        rng: the generator.
        part: which images of a batch they are; each is augmented as within the whole batch.
        total: number of images in that batch; by default these are all.
    """
    if kind == "none":
        return pixels
    count, _, height, width = pixels.shape
    total = count if total is None else total
    pad = _pad(height)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    rows, columns = (pad + places for places in sources(kind, height, width, rng, part, total))
    cropped = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    shifted = cropped.permute(0, 3, 1, 2).contiguous()
    return distorted(shifted, rng, part=part, total=total) if kind.startswith("strong") else shifted


def sources(
    kind: Augmentation, height: int, width: int, rng: torch.Generator, part: slice, total: int
) -> tuple[Tensor, Tensor]:
    """The row and the column of its image that each row `[count, height]` and column `[count, width]` shows.

    Those outside of the image show zeros. With a generator in the state in which `augment` gets its own, the numbers
    are those of its images.

    Args:
        kind: of the augmentation, not `none`.
        height: of the images.
        width: of the images.
        rng: the generator.
        part: which images of a batch.
        total: number of images in that batch.
    """
    pad = _pad(height)
    top, left = torch.randint(0, 2 * pad + 1, (2, total), generator=rng)[:, part] - pad
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if kind in ("crop_flip", "strong_crop_flip"):
        mirrored = torch.rand(total, generator=rng)[part] < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return rows, columns


def _pad(height: int) -> int:
    return max(1, height // 8)


def distorted(
    pixels: Tensor,
    rng: torch.Generator,
    num_operations: int = 2,
    *,
    part: slice = EVERY,
    total: int | None = None,
) -> Tensor:
    """Each image after `num_operations` random operations of six, each with a random strength.

    Brightness or contrast times 0.4 to 1.6, blended with grey by up to 1, solarised above 0.4 to 1, posterised to 2 to
    6 bits, or a square of up to half the side cut out. Pixels stay in [0, 1]. `part` and `total`: see `augment`.

    Reference: Cubuk et al., RandAugment, CVPR 2020 Workshops: operations drawn uniformly.
    Differs: no rotation or shear, and the strength is random instead of fixed.
    """
    count, _, height, width = pixels.shape
    total = count if total is None else total
    for _ in range(num_operations):
        operation = torch.randint(0, 6, (total,), generator=rng)[part]
        strength, across, down = torch.rand(3, total, 1, 1, 1, generator=rng)[:, part]
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
