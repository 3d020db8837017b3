import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.data.augmentation import augment, distorted
from kdnas.data.base import Data, Images, TensorImages, changes, normalise
from kdnas.data.builtin import digits
from kdnas.data.cifar import cifar10, cifar100
from kdnas.data.folders import folder
from kdnas.data.load import load_data
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from tests.toy import data, part


def write_images(root, counts, size=(20, 16)):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (i * 9, 50, 100)).save(root / name / f"{i}.png")
    return root


def test_digits_are_split_by_order():
    from sklearn.datasets import load_digits

    loaded, made = load_digits(), digits()
    assert [len(p) for p in (made.train, made.search, made.test)] == [880, 220, 697]
    held = torch.cat([p.take(torch.arange(len(p))) for p in (made.train, made.search, made.test)])
    assert torch.equal(held[:, 0], torch.from_numpy(loaded.images).float() / 16)
    assert torch.equal(made.test.labels, torch.from_numpy(loaded.target[1100:]))


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    made = data()
    epochs = [torch.cat([made.indices(0, e * 3 + i, 16) for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(48))
    assert not torch.equal(*epochs)
    assert torch.equal(made.indices(0, 4, 16), made.indices(0, 4, 16))
    assert not torch.equal(made.indices(0, 4, 16), made.indices(1, 4, 16))


def test_a_shift_moves_an_image_by_at_most_an_eighth():
    images = torch.zeros(200, 1, 16, 16)
    images[:, 0, 8, 8] = 1
    moved = augment(images, "shift", torch_rng(0))
    places = moved[:, 0].flatten(1).argmax(1)
    rows, columns = places // 16, places % 16
    assert set(rows.tolist()) == set(columns.tolist()) == {6, 7, 8, 9, 10}
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))


def test_crop_flip_mirrors_half_of_the_images():
    images = torch.zeros(400, 1, 16, 16)
    images[:, 0, :, 12] = 1
    moved = augment(images, "crop_flip", torch_rng(0))
    left = (moved[:, 0, 8].argmax(1) < 8).float().mean()
    assert 0.4 < left < 0.6


def test_normalising_gives_the_train_part_mean_zero_and_deviation_one():
    made = digits()
    images = made.normalise(made.train.take(torch.arange(len(made.train))))
    assert images.mean().abs() < 1e-4
    assert abs(images.std() - 1) < 1e-4
    by_hand = normalise(torch.full((1, 1, 1, 1), 0.7), Preprocessing(height=1, width=1, mean=(0.5,), std=(0.1,)))
    assert float(by_hand) == pytest.approx(2.0)


def test_nan_names_the_image():
    images = torch.rand(4, 3, 8, 8)
    images[2, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 4 hold NaN.*number 2"):
        TensorImages(images, torch.arange(4))


def test_values_beyond_one_are_refused():
    with pytest.raises(ValueError, match="Divide by 255"):
        TensorImages(torch.full((2, 3, 8, 8), 200.0), torch.arange(2))


def test_a_class_with_one_training_image_is_refused():
    lonely = TensorImages(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]))
    train = TensorImages(torch.rand(3, 3, 8, 8), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"class 'b' has 1"):
        Data(train, lonely, lonely, class_names=("a", "b"))


def test_a_label_without_a_class_is_refused():
    with pytest.raises(ValueError, match="labels must be 0 to 1, the train part has 2"):
        Data(part(6, "a"), part(6, "b"), part(6, "c"), class_names=("a", "b"))


def test_class_folders_are_split_into_three_disjoint_parts(tmp_path):
    made = folder(str(write_images(tmp_path, {"cat": 20, "dog": 10})))
    assert made.class_names == ("cat", "dog")
    assert len(made.train) + len(made.search) + len(made.test) == 30
    assert torch.bincount(made.test.labels).tolist() == [4, 2]
    assert made.preprocessing.height == 16
    seen = [p.take(torch.arange(len(p)))[:, 0, 0, 0] * 255 for p in (made.train, made.search, made.test)]
    assert sorted(torch.cat(seen).round().int().tolist()) == sorted(
        [i * 9 for i in range(20)] + [i * 9 for i in range(10)]
    )


def test_a_given_test_folder_is_kept_for_testing(tmp_path):
    write_images(tmp_path / "train", {"cat": 6, "dog": 6})
    write_images(tmp_path / "test", {"cat": 3, "dog": 2})
    made = folder(str(tmp_path), size=8)
    assert len(made.test) == 5
    assert made.train.take(torch.tensor([0])).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("counts", "message"),
    [({"cat": 9}, "at least 2"), ({"cat": 9, "dog": 1}, "class 'dog' has 1"), ({}, "class folders .*got 0")],
)
def test_folders_that_cannot_be_split_are_refused(tmp_path, counts, message):
    with pytest.raises(ValueError, match=message):
        folder(str(write_images(tmp_path, counts)))


def test_other_classes_in_test_are_refused(tmp_path):
    write_images(tmp_path / "train", {"cat": 6, "dog": 6})
    write_images(tmp_path / "test", {"cat": 3, "cow": 2})
    with pytest.raises(ValueError, match=r"cow.*dog"):
        folder(str(tmp_path))


def test_a_broken_image_is_named(tmp_path):
    write_images(tmp_path, {"cat": 6, "dog": 6})
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png cannot be read"):
        folder(str(tmp_path), size=8)


def binary(path, count, label_bytes, classes):
    rng = np.random.default_rng(list(path.name.encode()))
    labels = (np.arange(count) % classes).astype(np.uint8)
    records = np.concatenate(
        [np.repeat(labels[:, None], label_bytes, 1), rng.integers(0, 255, (count, 3072), np.uint8)], 1
    )
    path.write_bytes(records.astype(np.uint8).tobytes())
    return records


def test_cifar_binary_files_are_read(tmp_path):
    records = [binary(tmp_path / f"data_batch_{i}.bin", 20, 1, 10) for i in range(1, 6)]
    binary(tmp_path / "test_batch.bin", 10, 1, 10)
    made = cifar10(str(tmp_path), search=20)
    assert [len(p) for p in (made.train, made.search, made.test)] == [80, 20, 10]
    written = {bytes(r[1:]): int(r[0]) for records_of_file in records for r in records_of_file}
    held = []
    for part_of in (made.train, made.search):
        pixels = (part_of.take(torch.arange(len(part_of))) * 255).round().to(torch.uint8).flatten(1)
        held += [(bytes(row.numpy()), int(label)) for row, label in zip(pixels, part_of.labels, strict=True)]
    assert dict(held) == written
    assert len(held) == len(written) == 100
    smaller = cifar10(str(tmp_path), search=20, size=16)
    assert smaller.train.take(torch.tensor([0])).shape == (1, 3, 16, 16)


def test_cifar100_takes_the_fine_label(tmp_path):
    binary(tmp_path / "train.bin", 600, 2, 100)
    binary(tmp_path / "test.bin", 100, 2, 100)
    assert cifar100(str(tmp_path), search=50).classes == 100


def test_packed_cifar_is_read_without_pickle(tmp_path):
    arrays = {}
    for name, count in (("train", 60), ("test", 10)):
        encoded = []
        for i in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (i * 4, 0, 0)).save(buffer, "JPEG")
            encoded.append(buffer.getvalue())
        arrays[f"{name}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{name}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "packed.npz", **arrays)
    assert len(cifar10(str(tmp_path / "packed.npz"), search=20).train) == 40
    np.savez(tmp_path / "bad.npz", train_jpeg=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="not a packed CIFAR file"):
        cifar10(str(tmp_path / "bad.npz"))


def test_pickled_cifar_is_refused_with_the_reason(tmp_path):
    (tmp_path / "batches.meta").write_bytes(b"")
    with pytest.raises(ValueError, match="pickles are never loaded"):
        cifar10(str(tmp_path))


def test_a_file_cut_short_is_refused(tmp_path):
    for i in range(1, 6):
        binary(tmp_path / f"data_batch_{i}.bin", 20, 1, 10)
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cut short"):
        cifar10(str(tmp_path))


def test_what_a_person_types_becomes_a_spec(tmp_path):
    assert load_data("digits").build(Data).classes == 10
    assert load_data("tests.toy:data").build(Data).classes == 3
    assert load_data(f"folder:{tmp_path}")["path"] == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digts", "Did you mean 'digits'"),
        ("folder", "folder:PATH"),
        ("no.such:thing", "cannot import"),
        ("tests.toy:dta", "Did you mean 'data'"),
    ],
)
def test_what_cannot_be_data_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_data(text)


def test_strong_augmentation_is_named_once():
    with pytest.raises(ValueError, match="strong must be named once"):
        load_data("strong:" * 2000 + "digits")


def test_strong_augmentation_is_drawn_from_the_step_stays_in_range_and_changes_images():
    made = load_data("strong:tests.toy:data").build(Data)
    assert made.augmentation == "strong_shift"
    plain = load_data("tests.toy:data").build(Data)
    ids = torch.arange(24)
    first = made.pixels(ids, 3, 7)
    assert torch.equal(first, made.pixels(ids, 3, 7))
    assert not torch.equal(first, made.pixels(ids, 3, 8))
    assert first.min() >= 0 and first.max() <= 1 and torch.isfinite(first).all()
    # The same shifts come first, from the same draws.
    assert first.shape == plain.pixels(ids, 3, 7).shape
    far = (first - plain.train.take(ids)).abs().mean((1, 2, 3))
    assert (far > 0.02).float().mean() > 0.8


def test_every_distortion_happens_and_changes_its_own_images_alone():
    pixels = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = distorted(pixels, torch.Generator().manual_seed(1), num_operations=1)
    grey = (found.std(1) < found.std(1).mean() * 0.5).flatten(1).all(1)
    cut = (found == 0.5).flatten(1).any(1)
    levels = torch.tensor([len(image.unique()) for image in found])
    assert 5 < int(cut.sum()) < 80 and int(grey.sum()) > 2
    assert 5 < int((levels < 70).sum()) < 80
    assert torch.equal(distorted(pixels, torch.Generator().manual_seed(1), num_operations=0), pixels)


def test_batches_hold_every_image_once_in_order_with_its_label():
    loaded = digits()
    pairs = list(loaded.search.batches(100))
    assert [len(labels) for _, labels in pairs] == [100, 100, 20]
    assert torch.equal(torch.cat([pixels for pixels, _ in pairs]), loaded.search.take(torch.arange(220)))
    assert torch.equal(torch.cat([labels for _, labels in pairs]), loaded.search.labels)


def test_the_shape_of_an_image_is_channels_height_and_width(tmp_path):
    root = write_images(tmp_path, {"a": 6, "b": 6}, size=(20, 16))
    assert folder(str(root), size=12).image == (3, 12, 12)
    assert digits().image == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": "abc"}, "`class_names` must be texts"),
        ({"class_names": (0, 1, 2)}, "`class_names` must be texts"),
        ({"class_names": ("a", "b", "a")}, "'a' is there twice"),
        ({"augmentation": "flip"}, "`augmentation` must be one of"),
        ({"test": torch.zeros(30, 3, 8, 8)}, "`test` must be Images.*got Tensor"),
        ({"search": TensorImages(torch.rand(30, 3, 9, 8), torch.arange(30) % 3)}, "one shape.*9"),
    ],
)
def test_data_that_do_not_fit_together_are_refused(change, message):
    parts = {"train": part(48, "a"), "search": part(30, "b"), "test": part(30, "c"), "class_names": ("a", "b", "c")}
    with pytest.raises(ValueError, match=message):
        Data(**parts | change)


def test_images_of_an_own_class_are_checked_too():
    class Wild(Images):
        def __init__(self, scale, dtype=torch.float32):
            self.labels, self.scale, self.dtype = torch.arange(12) % 3, scale, dtype

        def take(self, indices):
            return torch.full((len(indices), 3, 4, 4), self.scale, dtype=self.dtype)

    names = ("a", "b", "c")
    with pytest.raises(ValueError, match=r"train part must be in .*got 7 to 7"):
        Data(Wild(7.0), Wild(0.5), Wild(0.5), names)
    with pytest.raises(ValueError, match="train part must be in"):
        Data(Wild(float("nan")), Wild(0.5), Wild(0.5), names)
    with pytest.raises(ValueError, match=r"`take` of the search part must return float32.*float64"):
        Data(Wild(0.5), Wild(0.5, torch.float64), Wild(0.5), names)


def test_mean_and_deviation_do_not_depend_on_the_parts_they_are_computed_in():
    images = torch.rand(1203, 2, 3, 3, generator=torch_rng("many"))
    made = TensorImages(images, torch.arange(1203) % 2)
    preprocessing = Data(made, made, made, class_names=("a", "b")).preprocessing
    std, mean = torch.std_mean(images.double(), (0, 2, 3))
    assert preprocessing.mean == tuple(round(v, 6) for v in mean.tolist())
    assert preprocessing.std == tuple(round(v, 6) for v in std.tolist())


def test_a_sample_is_drawn_from_the_whole_part():
    labels = torch.arange(1000) // 100
    sorted_part = TensorImages(torch.rand(1000, 1, 2, 2), labels)
    images, drawn = sorted_part.sample(200, torch_rng("sample"))
    assert len(images) == 200 and torch.bincount(drawn).min() > 5
    assert torch.equal(sorted_part.sample(1000, torch_rng("sample"))[1], labels)


def test_the_fingerprint_follows_every_image_label_and_class_name():
    first = data()
    assert data().fingerprint == first.fingerprint
    images = first.test.images.clone()
    images[17, 0, 3, 3] += 0.01
    others = {
        "test has other images": dataclasses.replace(first, test=TensorImages(images, first.test.labels)),
        "search has other": dataclasses.replace(
            first, search=TensorImages(first.search.images, (first.search.labels + 1) % 3)
        ),
        "train has 45 images, had 48": dataclasses.replace(
            first, train=TensorImages(first.train.images[3:], first.train.labels[3:])
        ),
        "class names differ": dataclasses.replace(first, class_names=("x", "b", "c")),
    }
    for words, other in others.items():
        assert words in changes(first.fingerprint, other)
    assert changes(first.fingerprint, data()) == changes({}, first) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flder:pets", "Did you mean 'folder'"),
        ("folder:pets,sze=3", "Did you mean 'size'"),
        ("folder:pets,size=big", "size of folder:pets must be a whole number"),
        ("mine_own:cifar10", "cannot import 'mine_own'.*Data are digits, folder:PATH"),
        ("tests", "Did you mean folder:tests"),
        ("digits:somewhere", "digits has no path"),
        ("digits,size=8", "no argument 'size'. It takes none"),
        ("tests.toy:part", "must return a Data, it returns a TensorImages"),
        ("tests.toy:cnn", "from_dataset"),
    ],
)
def test_a_text_that_is_no_data_is_answered_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        load_data(text).build(Data)


def test_a_home_folder_is_found_after_the_colon_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("folder:~/pets")["path"] == str(tmp_path / "pets")


def test_labels_that_begin_at_one_or_are_far_too_large_are_refused():
    for labels, message in ((torch.arange(20) % 2 + 1, "Subtract 1"), (torch.arange(20) % 2 * 10**12, "10000000")):
        part = TensorImages(torch.rand(20, 1, 8, 8), labels)
        with pytest.raises(ValueError, match=message):
            Data(part, part, part, class_names=("a", "b"))


def test_arguments_follow_the_name_of_a_data_set():
    assert load_data("cifar10:x,size=16")["size"] == 16
    assert load_data("strong:folder:x,skip_broken=true")["data"]["skip_broken"] is True
    assert load_data("folder:a,b/c")["path"].endswith("a,b/c")
