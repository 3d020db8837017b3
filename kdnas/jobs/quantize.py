"""A student folder's int8 graph, calibrated on its own data."""

from pathlib import Path
from typing import Any

from kdnas.data.base import Data
from kdnas.evaluation import measure_of
from kdnas.runs.lock import hold
from kdnas.specs import Spec
from kdnas.students.folder import read_student
from kdnas.students.integers import MOST_LOST, calibration_images, quantize
from kdnas.students.trust import data_of
from kdnas.values import Count, Share, check_value


def quantize_student(
    student: Path, out: Path, *, data: Spec | None = None, num_images: int = 256, most: float = MOST_LOST, seed: int = 0
) -> dict[str, Any]:
    """Write a student's int8 graph, calibrated on training images, compared with the float one on the test part.

    Args:
        student: a student folder.
        out: the .onnx file to write.
        data: other data than the card names.
        num_images: number of training images for calibration.
        most: largest accepted loss of accuracy, a share of the test images.
        seed: of the choice of these images.

    Returns:
        The result of `kdnas.students.integers.quantize`, and the file.

    Raises:
        ValueError: as there; no data known; fewer than 1 image, or a share outside of [0, 1].
    """
    check_value("num_images", num_images, Count)
    check_value("most", most, Share)
    _, card = read_student(student)
    hold(out)
    loaded: Data = data_of(student, card, data).build(Data)
    images = calibration_images(loaded.train, num_images, seed)
    result = quantize(student, out, images, loaded.test, most, loaded.task)
    return {"graph": str(out), **result, **measure_of(loaded.task)}
