import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

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
