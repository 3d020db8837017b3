"""Pictures of what networks answer, for tasks that classify pixels: image, truth, teacher and student."""

import base64
import colorsys
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdnas.data.base import Data, normalise
from kdnas.network import default_device
from kdnas.runs.files import write_json
from kdnas.runs.folder import PICTURES
from kdnas.students.folder import read_student
from kdnas.tasks.labels import VOID
from kdnas.teachers.base import Teacher

_NUM_IMAGES = 6
_LONGEST = 400  # pixels of a picture's longer side
_GREY = (128, 128, 128)


def write_pictures(folder: Path, data: Data, student: Path, teacher: Teacher, grades: np.ndarray) -> None:
    """Write `pictures.json` into a run folder; nothing where the task has no pictures.

    It shows six test images, evenly spread from the best to the worst by the student's measure of each.

    Args:
        folder: of the run.
        data: its test part is shown.
        student: the folder of the student.
        teacher: the teacher.
        grades: of the student on each test image, `[images, ...]`.
    """
    if not data.task.dense:
        return
    qualities = data.task.quality(grades)
    order = np.argsort(-qualities, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(_NUM_IMAGES, len(order))).round().astype(int))
    indices = torch.from_numpy(order[places])
    pixels, labels = data.test.take(indices), data.test.truths(indices)
    device, (network, card) = default_device(), read_student(student)
    with torch.no_grad():
        logits = network.to(device)(normalise(pixels.to(device), card.preprocessing)).logits.cpu()
        taught = teacher.to(device)(pixels.to(device), labels.to(device)).logits.cpu()
    answer, target = (data.task.pixel_classes(each, labels) for each in (logits, taught))
    if answer is None or target is None:
        return
    truth = data.task.label_classes(labels, data.image[1:])
    shown = sorted({int(k) for each in (answer, target, truth) for k in each.unique()} - {VOID})
    write_json(
        folder / PICTURES,
        {
            "classes": [[data.class_names[k], "#{:02x}{:02x}{:02x}".format(*_colour(k))] for k in shown],
            "images": [
                {
                    "number": int(index),
                    "quality": float(qualities[index]),
                    "image": _png(_rgb(pixels[i])),
                    "truth": _png(_coloured(truth[i])),
                    "teacher": _png(_coloured(target[i])),
                    "student": _png(_coloured(answer[i])),
                }
                for i, index in enumerate(indices.tolist())
            ],
        },
    )


def _colour(number: int) -> tuple[int, int, int]:
    """The colour of a class: hues that are far apart, of two brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb((0.6 + 0.618034 * number) % 1, 0.7, (0.95, 0.65)[number // 2 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _coloured(labels: Tensor) -> Image.Image:
    """Classes `[height, width]` by their colours; void is grey."""
    numbers = labels.numpy()
    colours = {k: _GREY if k == VOID else _colour(k) for k in np.unique(numbers).tolist()}
    pixels = np.zeros((*numbers.shape, 3), np.uint8)
    for number, colour in colours.items():
        pixels[numbers == number] = colour
    return Image.fromarray(pixels)


def _rgb(pixels: Tensor) -> Image.Image:
    """Pixels `[channels, height, width]` in [0, 1], of which the first three are shown, or the first one in grey."""
    channels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray((channels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _png(picture: Image.Image) -> str:
    """A PNG file in base64."""
    scale = min(1.0, _LONGEST / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
