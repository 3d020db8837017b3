"""Which of a teacher's classes are the data's: by name, by number, or as they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Teacher
from kdnas.teachers.classes import columns_of
from kdnas.teachers.load import load_teacher
from kdnas.teachers.zoo import as_frozen

DATA = Preprocessing(height=8, width=8, mean=(0.5,) * 3, std=(0.3,) * 3)


@given(st.permutations(range(6)), st.integers(2, 6))
def test_names_in_any_order_lead_back_to_their_classes(order, count):
    theirs = [f"class {i}" for i in range(6)]
    wanted = [theirs[i].upper() for i in order[:count]]
    columns = columns_of("t", 6, theirs, wanted, count)
    assert [theirs[c].upper() for c in columns or range(6)][:count] == wanted


@pytest.mark.parametrize(
    ("names", "wanted", "select", "columns"),
    [
        (["a", "b"], ["a", "b"], "", ()),
        (None, ["a", "b", "c"], "", ()),
        (["x", "y", "z"], ["a", "b", "c"], "", ()),  # other words for as many classes: the accuracy decides
        (["tench, Tinca tinca", "cock", "hen"], ["hen", "tinca_tinca"], "", (2, 0)),
        (["n01440764, tench", "n01514668, cock"], ["n01514668", "n01440764"], "", (1, 0)),
        (None, ["a", "b"], "2+0", (2, 0)),
        (["a", "b", "c"], ["x", "y"], "C+a", (2, 0)),
    ],
)
def test_columns_by_hand(names, wanted, select, columns):
    count = len(names) if names else 3
    assert columns_of("t", count, names, wanted, len(wanted), select) == columns


@pytest.mark.parametrize(
    ("count", "names", "wanted", "select", "message"),
    [
        (5, None, ["a", "b"], "", r"has 5 classes, the data 2\. Name its class .* t,select=NUMBER.*kdnas fit"),
        (3, ["x", "a", "z"], ["a", "b"], "", r"has 3 classes, the data 2; its names include no class 'b'"),
        (3, ["a", "a", "b"], ["a", "b"], "", "its names include no class 'a'"),
        (2, None, ["a", "b", "c"], "", r"has 2 classes, the data 3\. Fine-tune"),
        (1, None, ["a", "b"], "", "1 output, the data 2 classes"),
        (5, None, ["a", "b"], "1", "must name one class for each of the data's 2, joined by .*, got 1"),
        (5, None, ["a", "b"], "1+5", "numbers from 0 to 4, got 5"),
        (5, None, ["a", "b"], "1+1", "must name each class once, got 1 again"),
        (5, None, ["a", "b"], "1+cat", "names 'cat', which is no class of it.*Give its number"),
        (2, ["cat", "dog"], ["a", "b"], "dog+cta", "Did you mean 'cat'"),
    ],
)
def test_classes_that_cannot_be_told_are_refused(count, names, wanted, select, message):
    with pytest.raises(ValueError, match=message):
        columns_of("t", count, names, wanted, len(wanted), select)


class Ranked(nn.Module):
    """Its logit of class i is i; says its names."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.class_names = [f"c{i}" for i in range(classes)]

    def forward(self, x):
        return self.conv(x).mean((1, 2, 3))[:, None] * 0 + torch.arange(float(len(self.class_names)))


def ranked():
    return Ranked(4)


def test_a_teacher_gives_the_logits_of_the_datas_classes_in_their_order():
    source = load_teacher(f"{__name__}:ranked")
    teacher = source.build(Teacher, classes=2, preprocessing=DATA, class_names=("C3", "c1"))
    assert teacher(torch.rand(2, 3, 8, 8)).logits.tolist() == [[3, 1]] * 2 and teacher.class_names == ("C3", "c1")
    assert teacher.note == "2 of its 4 classes, by their names"
    chosen = load_teacher(f"{__name__}:ranked,select=2+0").build(Teacher, classes=2, preprocessing=DATA)
    assert chosen(torch.rand(2, 3, 8, 8)).logits.tolist() == [[2, 0]] * 2
    with pytest.raises(ValueError, match=r"Did you mean 'select'"):
        load_teacher(f"{__name__}:ranked,selekt=2+0")


def test_members_of_an_ensemble_and_of_a_stream_are_told_the_names():
    for text in (f"ensemble:{__name__}:ranked,{__name__}:ranked,select=3+1", f"streamed:{__name__}:ranked"):
        options = {"classes": 2, "preprocessing": DATA, "class_names": ("c3", "c1")}
        logits = load_teacher(text).build(Teacher, **options)(torch.rand(2, 3, 8, 8)).logits
        torch.testing.assert_close(logits.softmax(1), torch.tensor([[3.0, 1.0]] * 2).softmax(1))


def test_a_function_of_images_is_a_teacher_and_what_is_none_is_refused():
    teacher = as_frozen(lambda images: images.mean((2, 3)), "mine", 3, DATA)
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(teacher(pixels).logits, ((pixels - 0.5) / 0.3).mean((2, 3)))
    assert teacher(pixels).features == ()
    with pytest.raises(ValueError, match=r"must return a torch module, or a function of images, it returned a int"):
        as_frozen(3, "mine", 3, DATA)
