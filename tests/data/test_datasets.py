from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from kdnas.data.datasets import from_dataset
from kdnas.jobs._memory import keep


class Entries(Dataset):
    def __init__(self, make, count=40):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.make(index)


def pixel(data):
    return data.train.take(torch.tensor([0]))[0, :, 0, 0]


def palette():
    picture = Image.new("P", (8, 8))
    picture.putpalette([255, 51, 0])
    return picture


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (palette(), (1, 0.2, 0)),
        (Image.new("L", (8, 8), 51), (0.2,)),
        (Image.fromarray(np.full((8, 8), 13_107, np.uint16)), (0.2,)),
        (np.full((3, 8, 8), 51, np.uint8), (0.2, 0.2, 0.2)),
        (np.full((8, 8, 3), 51, np.uint8), (0.2, 0.2, 0.2)),
        (np.full((8, 8), 0.2), (0.2,)),
        (torch.full((3, 8, 8), 0.2), (0.2, 0.2, 0.2)),
    ],
)
def test_images_of_every_kind_arrive_in_0_to_1(image, expected):
    data = from_dataset(Entries(lambda i: (image, i % 2)))
    assert pixel(data).tolist() == pytest.approx(expected)


def test_gray_among_colours_becomes_three_channels():
    data = from_dataset(
        Entries(lambda i: (Image.new("L" if i % 2 else "RGB", (8, 8), 9 if i % 2 else (9, 9, 9)), i % 2))
    )
    assert data.image == (3, 8, 8) and data.train.images.unique().tolist() == [9]


def test_labels_may_be_texts_and_entries_mappings():
    data = from_dataset(Entries(lambda i: {"img": torch.full((1, 4, 4), i % 2 / 2), "label": ["dog", "cat"][i % 2]}))
    assert data.class_names == ("cat", "dog")
    assert torch.equal(data.train.images[:, 0, 0, 0] == 0, data.train.labels == 1)


def test_a_data_loader_is_read_by_its_data_set():
    entries = Entries(lambda i: (torch.full((1, 4, 4), i / 40), i % 2))
    loader = DataLoader(entries, batch_size=4, shuffle=True)
    assert from_dataset(loader).fingerprint == from_dataset(entries).fingerprint
    assert keep(loader) == keep(entries)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lambda i: (torch.rand(1, 4, 4), torch.eye(2)[i % 2]), "one-hot"),
        (lambda i: (torch.rand(1, 4, 4), 0.5), "whole numbers"),
        (lambda i: (torch.rand(1, 4, 4), None), "got 'None'"),
        (lambda i: (torch.randn(3, 4, 4) * 3, 0), "image 0 of the data set.*not normalised"),
        (lambda i: (None, 0), "image 0 of the data set"),
        (lambda i: (torch.rand(1, 4 + i % 2, 4), 0), "image 1 has"),
        (lambda i: (1, 2, 3), "pair"),
        (lambda i: {"x": 1}, r"keys image and label, got \['x'\]"),
    ],
)
def test_entries_that_are_no_image_with_a_label_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        from_dataset(Entries(entry))


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="length and entries by index"):
        from_dataset(iter([]))


def test_data_in_memory_that_differ_anywhere_have_different_keys():
    images = torch.zeros(400, 1, 4, 4)
    first = keep(Entries(lambda i: (images[i], i % 2), 400))
    images[300] = 1
    assert keep(Entries(lambda i: (images[i], i % 2), 400)) != first


GRAY = Entries(lambda i: (np.full((4, 4), 10 * i, np.uint8), i % 2), 20)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda entries: entries,
        lambda entries: Subset(entries, range(12)),
        lambda entries: ConcatDataset([Subset(entries, range(12)), entries]),
        lambda entries: DataLoader(Subset(entries, range(12)), batch_size=2),
    ],
)
@pytest.mark.parametrize("names", [{"classes": ["dog", "cat"]}, {"class_to_idx": {"cat": 1, "dog": 0}}])
def test_class_names_are_read_inside_of_what_wraps_a_data_set(wrap, names):
    entries = Entries(GRAY.make, 20)
    vars(entries).update(names)
    assert from_dataset(wrap(entries)).class_names == ("dog", "cat")


def test_a_hubs_features_name_the_classes():
    entries = Entries(lambda i: {"image": np.full((4, 4), 10 * i, np.uint8), "label": i % 2}, 20)
    entries.features = {"image": None, "label": SimpleNamespace(names=["dog", "cat"])}
    assert from_dataset(entries).class_names == ("dog", "cat")


def test_parts_of_other_classes_mappings_of_parts_and_unreadable_entries_are_refused():
    entries, others = Entries(GRAY.make, 20), Entries(GRAY.make, 20)
    entries.classes, others.classes = ["cat", "dog"], ["dog", "cat"]
    with pytest.raises(ValueError, match="same classes in one order"):
        from_dataset(entries, others)
    with pytest.raises(ValueError, match="Pass its parts"):
        from_dataset({"train": entries, "test": entries})
    with pytest.raises(ValueError, match="images to train, search and test with, got 2"):
        from_dataset(Subset(entries, [0, 1]))
    with pytest.raises(ValueError, match="entry 0 of the data set cannot be read: ZeroDivisionError"):
        from_dataset(Entries(lambda i: 1 // i))
