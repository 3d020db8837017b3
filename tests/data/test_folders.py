import logging

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.cli.commands import main
from kdnas.data.base import Data
from kdnas.data.folders import folder
from kdnas.data.load import load_data


def write(root, counts, value=0, size=(8, 8)):
    """A folder per class with so many images of one brightness."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", size, value).save(root / name / f"{value}-{i}.png")
    return root


def brightness(part):
    return {int(v) for v in (part.take(torch.arange(len(part)))[:, 0, 0, 0] * 255).round()}


TWO = {"cat": 6, "dog": 6}


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train", "test"), ((10, 20), {10}, {20})),
        (("Train", "Test"), ((10, 20), {10}, {20})),
        (("TRAINING", "Testing"), ((10, 20), {10}, {20})),
        (("training_set", "test_set"), ((10, 20), {10}, {20})),
        (("seg_train", "seg_test"), ((10, 20), {10}, {20})),
        (("train2017", "val2017"), ((10, 20), {10}, {20})),
        (("train", "valid"), ((10, 20), {10}, {20})),
        (("trainset", "validation"), ((10, 20), {10}, {20})),
        (("train", "Holdout"), ((10, 20), {10}, {20})),
        (("train", "test", "val"), ((10, 20, 30), {30}, {20})),
        (("Train Images", "Test Images", "Validation Images"), ((10, 20, 30), {30}, {20})),
    ],
)
def test_parts_are_recognised_by_their_names(tmp_path, names, parts):
    values, search, test = parts
    for name, value in zip(names, values, strict=True):
        write(tmp_path / name, TWO, value)
    data = folder(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert (brightness(data.train), brightness(data.search), brightness(data.test)) == ({10}, search, test)
    assert all(name in data.source for name in names), data.source


def test_parts_inside_of_the_classes_are_recognised(tmp_path):
    for name in TWO:
        write(tmp_path / name, {"train": 6}, 10)
        write(tmp_path / name, {"test": 3}, 20)
    data = folder(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert brightness(data.train) == {10} and brightness(data.test) == {20}


def test_a_class_that_is_called_like_a_part_is_a_class(tmp_path):
    data = folder(str(write(tmp_path, {"bus": 6, "train": 6, "test": 5})))
    assert data.class_names == ("bus", "test", "train")


def test_folders_around_the_data_are_passed(tmp_path):
    write(tmp_path / "archive" / "set" / "train" / "train", TWO)
    write(tmp_path / "archive" / "set" / "test" / "test", TWO, 20)
    data = folder(str(tmp_path))
    assert data.class_names == ("cat", "dog") and brightness(data.test) == {20}


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    write(tmp_path, TWO)
    write(tmp_path, {".ipynb_checkpoints": 5, "__MACOSX": 5})
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "cat" / "readme.txt").write_text("")
    (tmp_path / "cat" / "more.png").mkdir()
    data = folder(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert len(data.train) + len(data.search) + len(data.test) == 12
    assert "left out: 1 files with .txt" in data.source


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["train/cat", "train/dog", "training/cat", "training/dog"],
            "must have one train part, got train and training",
        ),
        (
            ["cat/train_a", "cat/train_b", "cat/test", "dog/train", "dog/test"],
            "cat must have one train part, got train_a and train_b",
        ),
        (["fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"], r"fold2\) hold folders and no images \(cat, dog\)"),
        (["animal/cat", "animal/dog", "plant/elm", "plant/oak"], r"no images \(cat, dog, elm, oak\).*merge=true"),
        (["val/cat", "val/dog", "test/cat", "test/dog"], "no training part"),
        (["train", "test"], "no training part with one folder per class"),
        (["train/cat", "train/dog", "test"], "test must hold one folder per class.*but holds images"),
        (["train/cat", "train/dog", "val/cat"], r"train and validation must have the same classes, \['dog'\]"),
        (["train/cat"], "at least 2 classes"),
    ],
)
def test_folders_whose_roles_are_not_clear_are_refused(tmp_path, paths, message):
    for path in paths:
        write(tmp_path, {path: 6})
    with pytest.raises(ValueError, match=message):
        folder(str(tmp_path))


def test_sub_folders_of_the_same_names_are_merged_where_that_is_said(tmp_path):
    for path in ("benign/40X", "benign/100X", "malignant/40X", "malignant/100X"):
        write(tmp_path, {path: 4})
    with pytest.raises(ValueError, match="merge=true"):
        folder(str(tmp_path))
    assert load_data(f"folder:{tmp_path},merge=true").build(Data).class_names == ("benign", "malignant")


def test_a_class_of_files_that_are_no_images_is_explained(tmp_path):
    write(tmp_path, TWO)
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic" / "a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class 'heic' has 0.*1 files with \.heic"):
        folder(str(tmp_path))


def test_broken_files_are_listed_or_left_out_and_counted(tmp_path):
    write(tmp_path, TWO)
    (tmp_path / "cat" / "bad.png").write_bytes(b"")
    (tmp_path / "dog" / "worse.jpg").write_bytes(b"x")
    with pytest.raises(
        ValueError,
        match=r"2 of 14 files cannot be decoded: .*(bad\.png.*worse\.jpg|worse\.jpg.*bad\.png).*skip_broken=true",
    ):
        folder(str(tmp_path))
    data = load_data(f"folder:{tmp_path},skip_broken=true").build(Data)
    assert len(data.train) + len(data.search) + len(data.test) == 12
    assert "2 files that cannot be decoded are left out" in data.source


def test_the_side_is_the_median_of_the_images_and_not_the_first_ones(tmp_path):
    write(tmp_path, TWO, size=(20, 16))
    Image.new("L", (4, 4)).save(tmp_path / "cat" / "0-0.png")
    assert folder(str(tmp_path)).image == (3, 16, 16)
    assert load_data(f"folder:{tmp_path},size=12").build(Data).image == (3, 12, 12)


def test_images_of_16_bits_keep_their_levels_in_memory(tmp_path):
    for name in TWO:
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.fromarray(np.full((4, 4), 1000 + i, np.uint16)).save(tmp_path / name / f"{i}.png")
    data = folder(str(tmp_path))
    levels = (data.train.take(torch.arange(len(data.train)))[:, 0, 0, 0] * 65_535).round()
    assert len(levels.unique()) > 3 and 1000 <= levels.min() <= levels.max() <= 1005


def test_a_run_says_how_its_data_have_changed(tmp_path, log):
    from kdnas.jobs._run import report_changes

    data = folder(str(write(tmp_path, TWO)))
    before = dict(data.fingerprint)
    report_changes(before, folder(str(tmp_path)), "run r")
    assert not log.records
    Image.new("L", (8, 8), 99).save(tmp_path / "cat" / "new.png")
    report_changes(before, folder(str(tmp_path)), "run r")
    (record,) = log.records
    assert record.levelno == logging.WARNING
    assert "data of run r have changed: train" in record.message


def test_links_are_followed_but_never_upwards(tmp_path):
    write(tmp_path / "real" / "more", {"cat": 4, "dog": 4}, 10)
    root = write(tmp_path / "data", TWO)
    for name in TWO:
        (root / name / "linked").symlink_to(tmp_path / "real" / "more" / name)
        (tmp_path / "real" / "more" / name / "back").symlink_to(root / name)
    (root / "cat" / "up").symlink_to(root)
    data = folder(str(root))
    assert sum(map(len, (data.train, data.search, data.test))) == 20
    assert torch.bincount(data.train.labels).tolist() == [7, 7]


def test_images_beside_masks_of_the_same_classes_are_not_two_classes(tmp_path):
    for kind in ("images", "masks"):
        for part in ("train", "val"):
            write(tmp_path / kind / part, TWO)
    with pytest.raises(ValueError, match=r"images/train, masks/train\) hold folders and no images \(cat, dog\)"):
        folder(str(tmp_path))


def test_a_file_in_place_of_a_folder_is_said_to_be_one(tmp_path):
    (tmp_path / "pets.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pets.zip is a file. Unpack it"):
        folder(str(tmp_path / "pets.zip"))


def test_folders_that_systems_make_are_no_classes(tmp_path):
    write(tmp_path, {**TWO, "@eaDir": 6, "$RECYCLE.BIN": 6, "lost+found": 1, "cat/@eaDir": 3, "__pycache__": 1})
    data = folder(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert sum(map(len, (data.train, data.search, data.test))) == 12


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    write(tmp_path / "train", {"caf\u00e9": 6, "dog": 6})
    write(tmp_path / "test", {"cafe\u0301": 2, "dog": 2})
    assert folder(str(tmp_path)).class_names == ("caf\u00e9", "dog")


def test_sub_folders_of_a_single_class_are_merged_and_that_is_said(tmp_path):
    write(tmp_path, {**TWO, "fox/red": 4, "fox/gray": 4})
    data = folder(str(tmp_path))
    assert data.class_names == ("cat", "dog", "fox")
    assert "3 class folders, the sub-folders of fox merged" in data.source


def test_a_file_that_links_put_into_two_classes_or_parts_is_refused(tmp_path):
    write(tmp_path / "train", TWO)
    link = tmp_path / "train" / "dog" / "z.png"
    link.symlink_to(tmp_path / "train" / "cat" / "0-0.png")
    with pytest.raises(ValueError, match=r"0-0.png and .*z.png are one file, in 'cat' of train and 'dog' of train"):
        folder(str(tmp_path))
    link.unlink()
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="are one file, in 'cat' of test and 'cat' of train"):
        folder(str(tmp_path))


@pytest.mark.parametrize("size", [-1, 100_000])
def test_a_size_that_no_image_can_have_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"`size` must be 0 to 8192, got {size}"):
        folder(str(write(tmp_path, TWO)), size=size)


HOSTILE = "x\x1b]0;t\x07\x9b2J\u202e\u2066\nnext: rm"


@pytest.mark.parametrize("name", [f"cat{c}" for c in "\x1b\n\r\x9b\u202e\u2066"])
def test_a_class_whose_name_a_terminal_would_obey_is_refused_in_one_sentence(tmp_path, name, capsys):
    write(tmp_path, {name: 6, "dog": 6})
    with pytest.raises(SystemExit) as end:
        main(["run", "--data", f"folder:{tmp_path}", "--space", "toy", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "`class_names` must be printable, got 'cat\\" in error and error.isprintable()


@pytest.mark.parametrize("place", ["file", "part", "other", "suffix"])
def test_no_name_of_a_file_or_folder_reaches_a_terminal_as_it_is(tmp_path, place, capsys):
    hostile, classes = HOSTILE, tmp_path
    if place == "part":
        classes = tmp_path / f"train {hostile}"
        write(tmp_path / "test", TWO)
    write(classes, TWO)
    if place == "other":
        (classes / "cat" / hostile).mkdir()
    if place == "suffix":
        (classes / "cat" / f"a.{hostile}").write_text("")
    if place == "file":
        (classes / "cat" / f"{hostile}.png").write_text("no image")
    else:
        assert folder(str(tmp_path), skip_broken=True).source.isprintable()
    with pytest.raises(SystemExit) as end:
        main(
            ["run", "--data", f"folder:{tmp_path}", "--space", "toy", "--budget", "macs=1", "--out", f"{tmp_path}/out"]
        )
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.replace("\n", "").isprintable()
    assert not any(line.startswith("next: rm") for line in error.splitlines())
