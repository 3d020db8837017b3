"""CULane's and TuSimple's folders: lanes where their points say, and every kind of damage with its file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.data.files import FileImages
from kdnas.data.lanes import culane, tusimple
from kdnas.data.load import load_data
from kdnas.tasks.lanes import exists

HEIGHT, WIDTH = 30, 80
LINES = "10.5 25 20.5 15 30.5 5\n70 25 60 15 50 5\n"
ROWS = [5, 15, 25]


def picture(path, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)


@pytest.fixture
def lines_folder(tmp_path):
    """CULane's folders, with a list of four training images, one for search and one for test."""
    root = tmp_path / "culane"
    (root / "list").mkdir(parents=True)
    for name, count in (("train", 4), ("val", 1), ("test", 1)):
        images = [f"driver_{name}/{number:05}.jpg" for number in range(count)]
        for image in images:
            picture(root / image)
            (root / image).with_suffix(".lines.txt").write_text(LINES)
        (root / "list" / f"{name}.txt").write_text("".join(f"/{image}\n" for image in images))
    return root


def record(name, **changes):
    lanes = [[30.5, 20.5, 10.5], [50, 60, 70], [-2, -2, 79]]
    return json.dumps({"raw_file": name, "h_samples": ROWS, "lanes": lanes} | changes)


@pytest.fixture
def json_folder(tmp_path):
    """TuSimple's folders, with images of training and test apart."""
    root = tmp_path / "tusimple"
    for part, file, count in (("train_set", "train_set/label_data_0313.json", 5), ("test_set", "test_label.json", 2)):
        names = [f"clips/{part}/{number}/20.jpg" for number in range(count)]
        for name in names:
            picture(root / part / name)
        (root / file).write_text("\n".join(map(record, names)) + "\n")
    (root / "test_set" / "test_tasks_0627.json").write_text("no labels")
    return root


def check_places(label, left, right):
    """Lanes through (10.5, 25), (20.5, 15), (30.5, 5) and their mirror image nearly."""
    lane = label[left] * WIDTH - 0.5
    assert torch.allclose(lane[5:26], 30.5 - (torch.arange(5, 26) - 5.0), atol=1e-4)
    assert (label[left, :5] == -1).all() and (label[left, 26:] == -1).all()
    assert float(label[right, 15]) * WIDTH == pytest.approx(60.5, abs=1e-3)


def test_culane(lines_folder):
    data = culane(str(lines_folder))
    assert [len(part) for part in (data.train, data.search, data.test)] == [4, 1, 1]
    assert data.image == (3, HEIGHT, WIDTH) and data.task.name == "lanes" and data.classes == 9
    labels = data.train.truths(torch.arange(4))
    assert exists(labels)[0].tolist() == [False, True, True, False]
    check_places(labels[0], 1, 2)
    again = load_data(f"culane:{lines_folder}").build()
    assert again.fingerprint == data.fingerprint


def test_lists_with_masks_and_flags_and_other_sizes(lines_folder):
    for file in (lines_folder / "list").glob("*.txt"):
        text = "".join(f"{line} /laneseg/0.png 0 1 1 0\n" for line in file.read_text().splitlines())
        file.with_stem(f"{file.stem}_gt").write_text(text)
        file.unlink()
    whole, small = culane(str(lines_folder)), culane(str(lines_folder), height=15, width=40, lanes=2)
    assert small.image == (3, 15, 40) and small.train.labels.shape == (4, 2, 15)
    # Row 7 of 15 shows rows 14 and 15; the shares of the width are those of the points between.
    expected = whole.train.labels[0, 1, 14:16].mean()
    assert float(small.train.labels[0, 0, 7]) == pytest.approx(float(expected), abs=1e-6)


def test_tusimple(json_folder):
    data = tusimple(str(json_folder))
    assert [len(part) for part in (data.train, data.search, data.test)] == [4, 1, 2]
    labels = data.test.truths(torch.arange(2))
    assert exists(labels)[0].tolist() == [False, False, True, True, False, False]  # one point is no lane
    check_places(labels[0], 2, 3)
    assert load_data(f"tusimple:{json_folder},lanes=4").build().train.labels.shape == (4, 4, HEIGHT)


def test_an_image_is_that_beside_its_labels_where_both_parts_have_one_of_its_name(json_folder):
    for number, brightness in (("train_set", 10), ("test_set", 200)):
        path = json_folder / number / "clips" / "same.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (brightness,) * 3).save(path)
    for file in ("test_label.json", "test_set/test_label.json"):
        (json_folder / "test_label.json").unlink(missing_ok=True)
        (json_folder / file).write_text(record("clips/same.png"))
        data = tusimple(str(json_folder))
        assert len(data.test) == 1 and float(data.test.take(torch.tensor([0])).mean() * 255) == pytest.approx(200)


def test_images_that_do_not_fit_into_memory_are_decoded_later(lines_folder, monkeypatch):
    small = culane(str(lines_folder))
    monkeypatch.setattr("kdnas.data.lanes._MOST_BYTES", 1)
    large = culane(str(lines_folder))
    assert isinstance(large.train, FileImages) and not isinstance(small.train, FileImages)
    places = torch.tensor([2, 0])
    torch.testing.assert_close(large.train.take(places), small.train.take(places))
    assert torch.equal(large.train.truths(places), small.train.truths(places))


def list_of(text):
    return lambda root: (root / "list" / "train.txt").write_text(text)


def lines_of(content):
    def write(root):
        path = root / "driver_train" / "00001.lines.txt"
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "list" / "train.txt").unlink(), "must hold list/train.txt or list/train_gt.txt"),
        (list_of(""), "there must be images to train with"),
        (list_of("/driver_train/no.jpg\n"), r"line 1 of .*train.txt names '/driver_train/no.jpg', but there is no "),
        (list_of("/../../secret.jpg\n"), r"names '/../../secret.jpg', which is not below"),
        (list_of("a\0b.jpg\n"), "which is not below"),
        (list_of("x" * 5000 + ".jpg\n"), "but there is no"),
        (list_of("/a.jpg /b.png 0 1 2 0\n"), "flags of 0 and 1"),
        (lambda root: (root / "list" / "train.txt").write_bytes(b"\xff\xfe\xfa"), r"train.txt cannot be read as UTF-8"),
        (lambda root: (root / "driver_train/00001.lines.txt").unlink(), r"but there is no .*00001.lines.txt"),
        (lambda root: (root / "driver_train/00001.jpg").unlink(), r"but there is no .*00001.jpg"),
        (lambda root: (root / "driver_train/00001.jpg").write_bytes(b""), r"00001.jpg cannot be read: it is empty"),
        (lines_of("1 2 3\n"), r"line 1 of .*00001.lines.txt must have pairs of x and y, got 3 numbers"),
        (lines_of("1 2 3 4\n1 2 x 4\n"), r"line 2 of .*00001.lines.txt cannot be read: a number has digits"),
        (lines_of("1 2 nan 4\n"), "of at most 1e.06 pixels, got nan"),
        (lines_of("1 2 3 inf\n"), "got inf"),
        (lines_of("1 2 3 1e300\n"), "got 1e.300"),
        (lines_of(b"\x80\x81"), r"00001.lines.txt cannot be read as UTF-8"),
        (lines_of("".join(f"{x} 25 {x} 5\n" for x in range(5))), r"00001.lines.txt cannot be used: it has 5 lanes"),
        (lambda root: [f.write_text("") for f in root.rglob("*.lines.txt")], "the train part must have lanes"),
    ],
)
def test_damage_of_culane_is_told_with_its_file(lines_folder, damage, message):
    damage(lines_folder)
    with pytest.raises(ValueError, match=message) as error:
        culane(str(lines_folder))
    assert "\n" not in str(error.value)


def label_line(**changes):
    def write(root):
        file = root / "train_set" / "label_data_0313.json"
        lines = file.read_text().splitlines()
        lines[2] = record("clips/train_set/2/20.jpg", **changes)
        file.write_text("\n".join(lines))

    return write


def raw_line(text):
    return lambda root: (root / "train_set" / "label_data_0313.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "train_set" / "label_data_0313.json").unlink(), "must hold label_data_"),
        (raw_line('{"raw_file": '), r"line 1 of .*label_data_0313.json is damaged: it cannot be read"),
        (raw_line("[" * 100_000), r"label_data_0313.json is damaged"),
        (raw_line("[1]"), "must be an object with raw_file, lanes and h_samples"),
        (raw_line('{"raw_file": "a", "lanes": []}'), "must be an object with raw_file, lanes and h_samples"),
        (label_line(raw_file=3), r"`raw_file` in line 3 of .* must be a text, got 3"),
        (label_line(raw_file="../x.jpg"), "which is not below"),
        (label_line(raw_file="clips/no.jpg"), r"names 'clips/no.jpg', but there is no "),
        (label_line(lanes=3), r"`lanes` in line 3 of .* must be a list of lists, got 3"),
        (label_line(lanes=[[1, 2, "x"]]), "must hold lists of numbers"),
        (label_line(lanes=[[1, 2, True]]), "must hold lists of numbers"),
        (label_line(lanes=[[1, 2]]), "a lane of 2 columns for 3 rows"),
        (label_line(lanes=[[1, 2, float("nan")]]), "got nan"),
        (label_line(lanes=[[1, 2, 10**400]]), "of at most 1e.06 pixels, got 1000"),
        (label_line(h_samples="5"), "`h_samples` in line 3"),
        (label_line(lanes=[[x, x, x] for x in range(7)]), r"line 3 of .* it has 7 lanes, .* Add lanes=8"),
    ],
)
def test_damage_of_tusimple_is_told_with_its_line(json_folder, damage, message):
    damage(json_folder)
    with pytest.raises(ValueError, match=message) as error:
        tusimple(str(json_folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_folder_that_is_none_is_refused(tmp_path):
    for source in (culane, tusimple):
        with pytest.raises(ValueError, match="there is no folder"):
            source(str(tmp_path / "no"))
