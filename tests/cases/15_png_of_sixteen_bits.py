"""Gray PNGs of 16 bits in class folders: scaled by 65535, or refused by name; not clipped to white."""

import numpy as np
import torch
from PIL import Image

from kdnas.data.folders import folder as image_folder
from tests.cases import outcome

LEVELS = {"dim": 6_000, "lit": 50_000}


def check(folder):
    for name, level in LEVELS.items():
        (folder / name).mkdir()
        for i in range(6):
            pixels = np.full((8, 8), level + 10 * i, np.uint16)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    data = outcome(lambda: image_folder(str(folder)), ".png")
    if data is None:
        return
    images = data.train.take(torch.arange(len(data.train)))
    for label, (name, level) in enumerate(LEVELS.items()):
        mean = images[data.train.labels == label].mean().item()
        assert abs(mean - level / 65_535) < 0.02, f"{name}: mean {mean:.3f}, in the files {level / 65_535:.3f}"
