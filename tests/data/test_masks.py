"""Images with masks: three layouts, colours and numbers, void, and what is refused with its file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.data.load import load_data
from kdnas.data.masks import masks
from kdnas.tasks.segmentation import VOID

RNG = np.random.default_rng(0)


def picture(path, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(path)


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def both(size=(6, 8), classes=2):
    values = np.arange(size[0] * size[1]).reshape(size) % classes
    values[0, 0] = 255
    return values


def plain(root, count=8):
    for number in range(count):
        picture(root / "images" / f"{number}.jpg")
        mask(root / "masks" / f"{number}.png", both())
    return root


def test_images_and_masks_are_paired_by_name_and_split(tmp_path):
    data = masks(str(plain(tmp_path)))
    assert [len(part) for part in (data.train, data.search, data.test)] == [6, 1, 1]
    assert data.image == (3, 6, 8) and data.class_names == ("0", "1") and data.task.name == "segmentation"
    labels = data.train.truths(torch.arange(6))
    assert labels.shape == (6, 6, 8) and labels[0, 0, 0] == VOID and labels[0, 0, 1] == 1
    again = load_data(f"masks:{tmp_path}").build()
    assert again.fingerprint == data.fingerprint


def test_parts_and_names_and_void_lines(tmp_path):
    for role, count in (("train", 3), ("val", 2), ("test", 1)):
        for number in range(count):
            picture(tmp_path / "images" / role / f"{number}.png")
            mask(tmp_path / "labels" / role / f"{number}.png", both(classes=3))
    (tmp_path / "classes.txt").write_text("road\nvoid\ncar\n")
    data = masks(str(tmp_path))
    assert [len(part) for part in (data.train, data.search, data.test)] == [3, 2, 1]
    assert data.class_names == ("road", "car")
    assert data.test.truths(torch.tensor([0]))[0, 0, :4].tolist() == [VOID, VOID, 1, 0]


def test_parts_above_images_and_masks(tmp_path):
    for role in ("train", "valid", "test"):
        plain(tmp_path / role, 2)
    data = masks(str(tmp_path))
    assert [len(part) for part in (data.train, data.search, data.test)] == [2, 2, 2]


def test_colours_are_classes(tmp_path):
    plain(tmp_path)
    colours = np.array([[255, 0, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray(colours[np.arange(48).reshape(6, 8) % 3]).save(file)
    (tmp_path / "classes.txt").write_text("car 255 0 0\nsky 0 0 255\nvoid 0 0 0\n")
    data = masks(str(tmp_path))
    assert data.class_names == ("car", "sky")
    assert data.train.truths(torch.tensor([0]))[0, 0, :3].tolist() == [0, 1, VOID]


def test_voc(tmp_path):
    palette = [value for number in range(256) for value in (number, 255 - number, 0)]
    for name in ("2007_1", "2007_2", "2007_3"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg", (21, 8))
        values = np.repeat(np.arange(21, dtype=np.uint8)[:, None], 8, 1)
        values[:, 0] = 255
        image = Image.fromarray(values).convert("P")
        image = Image.fromarray(values, "P") if image.mode != "P" else image
        image.putdata(values.flatten().tolist())
        image.putpalette(palette)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        image.save(tmp_path / "SegmentationClass" / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n2007_2\n")
    (lists / "val.txt").write_text("2007_3\n")
    data = masks(str(tmp_path))
    assert data.classes == 21 and data.class_names[15] == "person"
    assert data.test.truths(torch.tensor([0]))[0, :3, 0].tolist() == [VOID] * 3
    assert data.test.truths(torch.tensor([0]))[0, 15, 4] == 15
    (lists / "train_aug.txt").write_text("2007_1\n")
    with pytest.raises(ValueError, match=r"must have one train list, got train.txt and train_aug.txt"):
        masks(str(tmp_path))
    (lists / "train_aug.txt").unlink()
    (lists / "train.txt").write_text("2007_1\nmissing\n")
    with pytest.raises(ValueError, match=r"names missing, but there is no .*missing.jpg"):
        masks(str(tmp_path))


def test_cityscapes(tmp_path):
    known = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for role in ("train", "val", "test"):
        for number in range(2):
            stem = f"ulm_{number}"
            picture(tmp_path / "leftImg8bit" / role / "ulm" / f"{stem}_leftImg8bit.png", (20, 4))
            values = np.repeat(np.array([*known, 0])[:, None], 4, 1)
            mask(tmp_path / "gtFine" / role / "ulm" / f"{stem}_gtFine_labelIds.png", values)
            picture(tmp_path / "gtFine" / role / "ulm" / f"{stem}_gtFine_color.png", (20, 4))
    data = masks(str(tmp_path))
    assert data.classes == 19 and data.class_names[0] == "road" and data.class_names[18] == "bicycle"
    assert data.train.truths(torch.tensor([0]))[0, :, 0].tolist() == [*range(19), VOID]


def test_cityscapes_as_it_is_published_has_no_labels_of_its_test_part(tmp_path):
    for role, count in (("train", 4), ("val", 2), ("test", 3)):
        for number in range(count):
            stem = tmp_path / "{}" / role / "ulm" / f"ulm_{number}_{{}}.png"
            values = np.zeros((2, 4)) if role == "test" else np.array([[7, 8, 3, 0]] * 2)
            picture(Path(str(stem).format("leftImg8bit", "leftImg8bit")), (2, 4))
            mask(Path(str(stem).format("gtFine", "gtFine_labelIds")), values)
    (tmp_path / "classes.txt").write_text("void\n" * 7 + "road\nsidewalk\n")
    data = masks(str(tmp_path))
    assert [len(part) for part in (data.train, data.search, data.test)] == [3, 1, 2]
    assert data.source.endswith("left out; a tenth of train is for search, validation is for test")


def test_black_and_white_masks_have_two_colours(tmp_path):
    plain(tmp_path)
    for file in (tmp_path / "masks").iterdir():
        mask(file, 255 * (both() == 1))
    with pytest.raises(
        ValueError, match=r"at least 2 classes, the training masks show '0' and void alone.*255 255 255"
    ):
        masks(str(tmp_path))
    (tmp_path / "classes.txt").write_text("back 0 0 0\nfront 255 255 255\n")
    labels = masks(str(tmp_path)).train.truths(torch.tensor([0]))[0]
    assert torch.equal(labels, torch.from_numpy(both() == 1).to(labels.dtype))


@pytest.mark.parametrize("place", ["images/{}", "{}/images"])
def test_each_part_is_one_folder(tmp_path, place):
    for role in ("train_a", "train_b", "val"):
        for kind in ("images", "masks"):
            folder = tmp_path / place.format(role).replace("images", kind)
            picture(folder / "0.png") if kind == "images" else mask(folder / "0.png", both())
    with pytest.raises(ValueError, match="must have one train part, got train_a and train_b"):
        masks(str(tmp_path))


def test_images_of_other_sizes_are_resized_where_asked(tmp_path):
    plain(tmp_path)
    picture(tmp_path / "images" / "0.jpg", (9, 12))
    mask(tmp_path / "masks" / "0.png", both((9, 12)))
    with pytest.raises(ValueError, match=r"images must have one size, .* Add height=H,width=W"):
        masks(str(tmp_path))
    assert masks(str(tmp_path), height=6, width=10).image == (3, 6, 10)


def test_images_of_one_name_in_several_folders_have_their_own_masks(tmp_path):
    for folder, value in (("berlin", 0), ("ulm", 1)):
        for number in range(4):
            picture(tmp_path / "images" / folder / f"{number}.png")
            values = np.full((6, 8), value)
            values[0, 0] = 1 - value
            mask(tmp_path / "masks" / folder / f"{number}.png", values)
    data = masks(str(tmp_path))
    marks = [int(labels[1, 1]) for part in (data.train, data.search, data.test) for labels in part.labels]
    assert sorted(marks) == [0] * 4 + [1] * 4
    (tmp_path / "masks" / "ulm" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"ulm/2.png has no mask .*ulm/2.png"):
        masks(str(tmp_path))


def test_a_turned_photograph_is_turned_before_it_is_compared_with_its_mask(tmp_path):
    plain(tmp_path)
    file = tmp_path / "images" / "3.jpg"
    upright = Image.open(file).copy()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert masks(str(tmp_path)).image == (3, 6, 8)


def test_parts_without_train_are_refused(tmp_path):
    for role in ("val", "test"):
        picture(tmp_path / "images" / role / "0.png")
        mask(tmp_path / "masks" / role / "0.png", both())
    with pytest.raises(ValueError, match="must be images to train with, got parts test, validation"):
        masks(str(tmp_path))


def test_class_weights_are_of_pixels(tmp_path):
    plain(tmp_path)
    for file in (tmp_path / "masks").iterdir():
        mask(file, np.array([[0] * 8] * 5 + [[1] * 8]))
    weights = masks(str(tmp_path), weighted=True).task.class_weights
    assert weights == pytest.approx(((1 / 5) ** 0.5, 1.0), abs=1e-5) or weights[1] > weights[0]
    assert weights[1] / weights[0] == pytest.approx(5**0.5, abs=1e-4)


def _break(root, how):
    file = root / "masks" / "3.png"
    if how == "size":
        mask(file, both((5, 8)))
    elif how == "number":
        (root / "classes.txt").write_text("a\nb\n")
        mask(file, both(classes=3))
    elif how == "void":
        mask(file, np.full((6, 8), 255))
    elif how == "missing":
        file.unlink()
    elif how == "damaged":
        file.write_bytes(b"no picture")
    elif how == "negative":
        Image.fromarray(np.full((6, 8), 65436, np.uint16)).save(file)  # -100 in 16 bits
    elif how == "number beside void":
        (root / "classes.txt").write_text("a\nvoid\nb\n")
        for each in (root / "masks").iterdir():
            mask(each, 2 * (both() == 1))
        mask(file, np.full((6, 8), 3))
    elif how == "alone":
        mask(root / "masks" / "more.png", both())
    elif how == "twice":
        picture(root / "images" / "3.bmp")
    elif how == "no image":
        (root / "images" / "3.jpg").write_bytes(b"no picture")
    elif how == "no text":
        (root / "classes.txt").write_bytes(b"\xff\xfea\n")
    elif how == "colours":
        picture(file)
    elif how == "absent class":
        (root / "classes.txt").write_text("a\nb\nnever\n")
    elif how == "colour":
        for each in (root / "masks").iterdir():
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(each)
        (root / "classes.txt").write_text("a 1 2 3\nb 4 5 6\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("size", r"3.png must have the size of its image .*3.jpg, 8 x 6, got 8 x 5"),
        ("number", r"3.png has the number 2, the classes are 0 to 1"),
        ("void", r"3.png is void alone"),
        ("missing", r"3.jpg has no mask .*3.png"),
        ("damaged", r"3.png cannot be read"),
        ("negative", r"3.png has the number 65436, there can be at most 1000 classes"),
        ("number beside void", r"3.png has the number 3, the classes are 0, 2"),
        ("alone", r"more.png has no image .*images/more\.\*"),
        ("twice", r"3.bmp and .*3.jpg have the same mask"),
        ("no image", r"3.jpg cannot be read"),
        ("no text", r"classes.txt cannot be read as UTF-8 text"),
        ("colours", r"3.png must hold class numbers in one channel, got the mode RGB"),
        ("absent class", r"training pixels, 'never' has none. .* in classes.txt: a line each in the order"),
        ("colour", r"png has the colour \(0, 0, 0\) at row 0, column 0"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_its_file(tmp_path, how, message):
    _break(plain(tmp_path), how)
    with pytest.raises(ValueError, match=message):
        masks(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n", "at least 2 classes"),
        ("a 1 2 3\nb\n", "a colour on every line"),
        ("a 1 2 3\nb 1 2 3\n", "different colours"),
    ],
)
def test_class_lists_that_are_none_are_refused(tmp_path, text, message):
    (plain(tmp_path) / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        masks(str(tmp_path))


def test_folders_of_no_layout_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold images/ and masks/"):
        masks(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder"):
        masks(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="at least 4 images"):
        masks(str(plain(tmp_path, 2)))
