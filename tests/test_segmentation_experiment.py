"""The experiment on CamVid, in small on images that are made here: every part of its page, and what it keeps."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

import experiments.segmentation as experiment
from tests.tasks.test_segmentation import space


def encoded(arrays, kind):
    files = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, kind)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    return np.concatenate(files), np.array([0, *itertools.accumulate(map(len, files))])


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    rng, content = np.random.default_rng(0), {"classes": np.array(["road", "car"])}
    for part, count in (("train", 6), ("val", 4), ("test", 4)):
        masks = rng.integers(0, 3, (count, 4, 5)).repeat(3, 1).repeat(4, 2).astype(np.uint8)  # 2 is void
        images = np.repeat(masks[..., None] * 100, 3, 3).astype(np.uint8)
        content[f"{part}_jpeg"], content[f"{part}_jpeg_offsets"] = encoded(images, "JPEG")
        content[f"{part}_mask_png"], content[f"{part}_mask_png_offsets"] = encoded(masks, "PNG")
    path = tmp_path_factory.mktemp("camvid") / "small.npz"
    np.savez(path, **content)
    return path


def test_the_page_has_every_method_and_the_chain_and_nothing_is_trained_twice(npz, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "load_space", lambda _: space())
    monkeypatch.setattr(experiment, "EVALUATIONS", 2)
    page = tmp_path / "page.md"
    small = ["--steps", "2", "--width", "4", "--seeds", "1", "--out", str(tmp_path / "runs"), "--page", str(page)]
    chosen = ["--only", "labels", "+ holistic", "CWD", "SAD"]
    experiment.main([str(npz), *small, *chosen])
    text = page.read_text()
    assert "6 training, 4 search and 4 test images of 12 x 20, 2 classes" in text
    assert all(f"| {row} |" in text for row in ("labels", "+ holistic", "CWD", "SAD", "student", "largest"))
    assert "## The chain" in text and "test mIoU less that of" in text
    monkeypatch.setattr(experiment, "one_run", None)
    experiment.main([str(npz), *small, *chosen])
    assert page.read_text() == text
    assert next(iter(experiment.METHODS)) == experiment.CONTROL and len(experiment.METHODS) == 7
