"""How long the device waits for images, by the number of processes that decode them, and where decoded ones are stored.

Usage: `python benchmarks/feeding.py [--decoders 0 1 2] [--images 512] [--side 500] [--size 96] [--batch-size 32]
[--steps 40] [--device cpu]`. JPEG files of photographs' size are drawn once, in a temporary folder, and are larger in
memory than the limit below which decoded images stay there. A ResNet (`--width`) is trained on them by the product's
own loop. The share is the time from asking for a step's images to having them, of the whole time of the steps, the
first few left out. Storing the decoded images (`--decoded` of the commands) is timed apart. The settings are measured
in turn, three times over, and the median is printed. Run it on an idle machine.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdnas.data.base import Data
from kdnas.data.decoded import stored_in
from kdnas.data.feeding import decoding
from kdnas.data.files import FileImages
from kdnas.distillers.from_labels import FromLabels
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

_WARM, _ROUNDS = 4, 3


def drawn(folder, count, side):
    """JPEG files of smooth colours with some noise, as photographs are to a decoder."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 20, side // 20, 3), np.uint8))
        pixels = np.asarray(coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(noisy).save(files[-1], quality=90)
    return files


def waiting(data, blueprint, recipe, device, decoders, place):
    """The share of the time that is waited for images, and the milliseconds of a step; decoded images are in a folder.

    Files are decoded for every step where the folder is None.
    """
    with decoding(decoders), stored_in(place):
        training = Training(initialised(lambda: Network(blueprint), 0), FromLabels(), data, None, recipe, device)
    waits, load = [], type(training._feed).__call__

    def timed(feed, step):
        began = time.perf_counter()
        images = load(feed, step)
        waits.append(time.perf_counter() - began)
        return images

    type(training._feed).__call__ = timed
    synchronize = torch.cuda.synchronize if training.device.type == "cuda" else lambda: None
    try:
        with closing(training), stored_in(place):
            for _ in range(_WARM):
                training.step()
            waits.clear()
            synchronize()
            began = time.perf_counter()
            while not training.done:
                training.step()
            synchronize()
            seconds = time.perf_counter() - began
    finally:
        type(training._feed).__call__ = load
    return sum(waits) / seconds, 1000 * seconds / len(waits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--decoders", type=int, nargs="+", default=[0, 1, 2], help="numbers (default: %(default)s)")
    parser.add_argument("--images", type=int, default=512, help="files (default: %(default)s)")
    parser.add_argument("--side", type=int, default=500, help="width of a file in pixels (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="of the images (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="of the network's first stage (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps per measurement (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = drawn(Path(folder), options.images, options.side)
        part = FileImages(files, torch.arange(len(files)) % 10, options.size)
        data = Data(part, part, part, class_names=tuple("0123456789"), augmentation="crop_flip")
        blueprint = fitted_teacher(data.image, data.classes, 0, options.width)
        recipe = Recipe(steps=_WARM + options.steps, batch_size=options.batch_size)
        place = Path(folder) / "decoded"
        began = time.perf_counter()
        with stored_in(place):
            part.take(torch.arange(1))
        storing = time.perf_counter() - began
        rows = {(number, stored): [] for stored in (None, place) for number in options.decoders}
        for _ in range(_ROUNDS):
            for (number, stored), measured in rows.items():
                measured.append(waiting(data, blueprint, recipe, options.device, number, stored))
    print(
        f"{options.images} JPEG files of {options.side} pixels as images of {options.size}, batches of "
        f"{options.batch_size}; {torch.get_num_threads()} threads compute on {options.device}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; stored once in {storing:.1f} s"
    )
    print("| decoders | images | waits | from, to | ms of a step |")
    print("| --- | --- | --- | --- | --- |")
    for (number, stored), measured in rows.items():
        images = "decoded each time" if stored is None else "stored"
        shares, seconds = zip(*measured, strict=True)
        spread = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"
        print(
            f"| {number} | {images} | {100 * statistics.median(shares):.1f} % "
            f"| {spread} | {statistics.median(seconds):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
