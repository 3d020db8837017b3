import numpy as np
import pytest
import torch

from kdnas.tasks.labels import as_labels


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0],
        np.array([[1], [0]], np.uint8),
        torch.tensor([1.0, 0.0]),
        [True, False],
        np.array([1, 0], dtype=object),
        torch.tensor([1, 0]).to(torch.uint16),
    ],
)
def test_whole_numbers_of_any_type_are_labels(labels):
    indices = as_labels(labels, 2)
    assert indices.dtype is torch.int64 and indices.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(2), r"one-hot. Use labels.argmax\(1\)"),
        (torch.tensor([[0.3, 0.7], [0.5, 0.5]]), "not one class each"),
        ([[1, 1], [0, 1]], "not one class each"),
        (["cat", "dog"], "got 'cat'.*class_names"),
        ([None, 1], "got 'None'"),
        ([0.5, 1], "image 0 has 0.5"),
        ([0.0, float("nan")], "image 1 has nan"),
        (torch.tensor([1e30, 0.0]), r"below 2\^62, got 1e\+30"),
        (np.array([2**64 - 1, 0], np.uint64), r"below 2\^62, got 1.84467e\+19"),
        ([0, 1, 2], "3 labels for 2 images"),
        (1, "one class index per image"),
    ],
)
def test_labels_that_are_no_class_are_refused_in_a_sentence(labels, message):
    with pytest.raises(ValueError, match=message):
        as_labels(labels, 2)
