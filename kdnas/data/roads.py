"""Small synthetic roads with known lanes, for tests and experiments."""

from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from kdnas.data.base import Data, TensorImages
from kdnas.randomness import python_rng, torch_rng
from kdnas.tasks.lanes import NONE, Lanes
from kdnas.values import Count, Seed, Size

_MOST_BYTES = 2**30
_LEAST = 10  # images
_LINE = 0.025  # width of a line in the masks: small images have few pixels
_NEAREST = 0.12  # depth from which lanes are drawn: 0 is the horizon, 1 the lower edge


def roads(count: Count, height: Size = 64, width: Size = 160, lanes: Count = 4, seed: Seed = 0) -> Data:
    """Drawn roads seen from a car: of so many images a fifth is for test and a tenth for search.

    A road has a horizon, a vanishing point and a curvature, lines that are solid or broken, white or yellow and faded,
    some of which are missing (the outer ones more often), cars in front of lines, shadows, streaks that are no
    lines, and noise. A lane's label goes through where cars and gaps hide it, as in CULane. Image i is a function of
    (seed, i) and of the size.

    Args:
        count: number of images, at least 10.
        height: of the images, at least 16.
        width: of the images, at least 16.
        lanes: number of lines of the whole road, even.
        seed: random seed.

    Raises:
        ValueError: too few images or too small ones, more than a gibibyte of them, or an odd number of lanes.

    Example:
        >>> data = roads(10, height=32, width=64)
        >>> len(data.train), data.image, data.train.labels.shape
        (7, (3, 32, 64), torch.Size([7, 4, 32]))
    """
    task = Lanes(lanes=lanes, line=_LINE)
    if count < _LEAST:
        raise ValueError(f"`count` of roads must be at least {_LEAST}, got {count}.")
    if min(height, width) < 16:
        raise ValueError(f"roads must be at least 16 x 16, got {height} x {width}.")
    if 3 * count * height * width > _MOST_BYTES:
        raise ValueError(f"{count:,} roads of {height} x {width} take more than a gibibyte. Lower one of the three.")
    drawn = [_road((seed, number), height, width, lanes) for number in range(count)]
    test, search = count // 5, max(1, count // 10)
    cuts = {"train": slice(test + search, None), "search": slice(test, test + search), "test": slice(test)}
    images, labels = (torch.stack(each) for each in zip(*drawn, strict=True))
    return Data(
        **{name: TensorImages(images[cut], labels[cut], task) for name, cut in cuts.items()},
        class_names=task.output_names,
        augmentation="crop_flip",
        source=f"{count} synthetic roads; a fifth is for test, a tenth for search",
        task=task,
    )


class _Scene(NamedTuple):
    """Where a road is.

    Attributes:
        depths: of each row, 0 at the horizon, 1 at the lower edge, negative above.
        vanishing: column of the vanishing point.
        offset: of the camera from the middle of its lane, in lanes.
        lane: width of a lane at the lower edge.
        curve: shift of the road's far end.
    """

    depths: Tensor
    vanishing: float
    offset: float
    lane: float
    curve: float

    def line(self, position: float) -> Tensor:
        """The column of a line in each row; position 0 is the middle of the camera's lane, 1 a lane to the right."""
        centre = (position + self.offset) * self.lane
        return self.vanishing + centre * self.depths + self.curve * (1 - self.depths).square()


def _road(key: tuple[int, int], height: int, width: int, lanes: int) -> tuple[Tensor, Tensor]:
    """An image `[3, height, width]`, uint8, and its label `[lanes, height]`."""
    draw, noise = python_rng(key[0], "road", key[1]), torch_rng(key[0], "road", key[1])
    horizon = height * draw.uniform(0.3, 0.42)
    scene = _Scene(
        (torch.arange(height) + 0.5 - horizon) / (height - horizon),
        width * draw.uniform(0.44, 0.56) - 0.5,
        draw.uniform(-0.25, 0.25),
        width * draw.uniform(0.3, 0.45),
        width * draw.uniform(-0.25, 0.25),
    )
    columns, below = torch.arange(width)[None], (scene.depths > 0)[:, None]
    edges = [scene.line(side * (lanes / 2 - 0.2))[:, None] for side in (-1, 1)]
    paved = below & (columns >= edges[0]) & (columns <= edges[1])
    image = torch.empty(3, height, width)
    sky, grass, grey = ([draw.uniform(*bounds) for bounds in each] for each in _PALETTE)
    for channel in range(3):
        ground = torch.where(paved, grey[0], grass[channel])
        image[channel] = torch.where(below, ground, sky[channel])
    image += 0.08 * torch.randn(1, height, width, generator=noise)
    positions = [number - (lanes - 1) / 2 for number in range(lanes)]
    there = [draw.random() < (0.92 if abs(position) < 1 else 0.65) for position in positions]
    there[lanes // 2 - 1] |= not any(there)  # one lane at least
    labels = torch.full((lanes, height), NONE)
    for slot, position in enumerate(positions):
        own = _marked(draw, scene, position, width)
        if there[slot]:
            image = torch.lerp(image, own[0], own[1])
            places = (scene.line(position) + 0.5) / width
            seen = (scene.depths > _NEAREST) & (places >= 0) & (places <= 1)
            labels[slot] = torch.where(seen, places, NONE)
    for _ in range(draw.randrange(3)):  # streaks
        place, start = draw.uniform(-lanes / 2, lanes / 2), draw.uniform(0.2, 0.8)
        own = _marked(draw, scene, place, width)
        near = ((scene.depths > start) & (scene.depths < start + 0.15))[:, None]
        image = torch.lerp(image, own[0], own[1] * near * 0.7)
    for _ in range(draw.randrange(4)):
        image = _with_car(image, draw, scene, draw.randrange(lanes - 1) - (lanes - 2) / 2)
    light = draw.uniform(0.55, 1.1) + draw.uniform(-0.25, 0.25) * torch.linspace(-1, 1, width)
    if draw.random() < 0.4:  # a shadow across
        begin, end = sorted(draw.uniform(0, 1) for _ in range(2))
        light = torch.where(((scene.depths > begin) & (scene.depths < end))[:, None], 0.5 * light, light)
    image = image * light + 0.03 * torch.randn(3, height, width, generator=noise)
    return (image.clamp(0, 1) * 255).round().byte(), labels


_PALETTE = (
    ((0.5, 0.8), (0.6, 0.85), (0.7, 1.0)),  # sky
    ((0.15, 0.4), (0.3, 0.5), (0.1, 0.25)),  # grass
    ((0.25, 0.5),),  # asphalt
)


def _marked(draw: Random, scene: _Scene, position: float, width: int) -> tuple[Tensor, Tensor]:
    """Colour `[3, 1, 1]` and opacity `[height, width]` of a line."""
    half = torch.clamp(width * draw.uniform(0.006, 0.011) * scene.depths, min=0.35)
    bright, is_yellow = draw.uniform(0.75, 1.0), draw.random() < 0.25
    colour = torch.tensor([bright, bright * (0.85 if is_yellow else 1), bright * (0.4 if is_yellow else 1)])
    distance = (torch.arange(width)[None] - scene.line(position)[:, None]).abs()
    cover = (half[:, None] + 0.5 - distance).clamp(0, 1) * draw.uniform(0.4, 1.0)
    on = scene.depths > _NEAREST / 2
    if draw.random() < 0.5:  # broken: equal lengths on the road
        phase = draw.random()
        on &= ((1.5 / scene.depths.clamp(min=0.05) + phase) % 1) < 0.55
    return colour[:, None, None], cover * on[:, None]


def _with_car(image: Tensor, draw: Random, scene: _Scene, position: float) -> Tensor:
    """The image with a car on a lane."""
    height, width = image.shape[1:]
    depth = draw.uniform(0.15, 0.8)
    bottom = int((scene.depths < depth).sum())
    row = min(bottom, height - 1)
    side = scene.lane * float(scene.depths[row]) * draw.uniform(0.55, 0.75)
    centre = float(scene.line(position + draw.uniform(-0.25, 0.25))[row])
    top = max(0, round(bottom - side * draw.uniform(0.6, 0.9)))
    left, right = max(0, round(centre - side / 2)), min(width, max(0, round(centre + side / 2)))
    colour = torch.tensor([draw.uniform(0, 0.9) for _ in range(3)])[:, None, None]
    changed = image.clone()
    changed[:, top:bottom, left:right] = colour
    changed[:, top : top + (bottom - top) // 2, left:right] *= 0.5  # its window
    return changed
