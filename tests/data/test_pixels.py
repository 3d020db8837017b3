import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdnas.data.base import TensorImages
from kdnas.data.pixels import as_pixels, channels_are_last

SHAPE = (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "value"),
    [
        (torch.full(SHAPE, 51, dtype=torch.uint8), 0.2),
        (np.full(SHAPE, 13_107, np.uint16), 0.2),
        (np.full(SHAPE, 13_107, ">u2"), 0.2),
        (torch.full(SHAPE, 13_107, dtype=torch.uint16), 0.2),
        (torch.ones(SHAPE, dtype=torch.bool), 1.0),
        (torch.full(SHAPE, 0.5, dtype=torch.float16), 0.5),
        (np.full(SHAPE, 0.5, ">f8"), 0.5),
        (np.full((2, 8, 8, 3), 0.5)[:, ::-1], 0.5),
        ([torch.full(SHAPE[1:], 0.5)] * 2, 0.5),
    ],
)
def test_every_type_of_pixels_arrives_in_0_to_1(images, value):
    part = TensorImages(images, [0, 1])
    pixels = part.take(torch.arange(2))
    assert pixels.shape == SHAPE and pixels.dtype is torch.float32
    torch.testing.assert_close(pixels, torch.full(SHAPE, value))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full(SHAPE, 255.0), "255 to 255. Divide by 255"),
        (torch.full(SHAPE, 16.0), "16 to 16. Divide by the largest value they can have"),
        (torch.full(SHAPE, 1.02), "1.02. Clamp"),
        (torch.full(SHAPE, -2.0), "not normalised"),
        (torch.zeros(SHAPE, dtype=torch.int16), "int16 from 0 to 0. Convert them to uint8"),
        (torch.full(SHAPE, 4095, dtype=torch.int32), "int32 from 4095 to 4095. Divide by the largest"),
        (torch.zeros(SHAPE, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 8, 8, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 9, 9, 5), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(8, 8), r"\[count, channels, height, width\], got \(8, 8\)"),
        (torch.zeros(2, 3, 0, 8), "got"),
        ([np.zeros((8, 8)), np.zeros((8, 7))], "one shape"),
        ([torch.zeros(1, 8, 8), torch.zeros(1, 8, 7)], "one shape"),
        (None, "numbers in a tensor or an array, got 'None'"),
        (["a.png", "b.png"], "got 'a.png'"),
        (np.ma.masked_array(np.zeros(SHAPE), np.ones(SHAPE, bool)), r"no masked values.*filled"),
        (torch.zeros(SHAPE).to_sparse(), "a dense tensor of numbers, got one that is sparse"),
        (torch.zeros(SHAPE, device="meta"), "on the meta device"),
    ],
)
def test_pixels_that_are_none_are_refused_in_a_sentence(images, message):
    with pytest.raises(ValueError, match=message):
        as_pixels(images)


def test_channels_last_of_an_array_become_channels_first():
    array = np.arange(2 * 8 * 6 * 3, dtype=np.uint8).reshape(2, 8, 6, 3)
    pixels = as_pixels(array)
    assert pixels.shape == (2, 3, 8, 6)
    assert pixels[1, 2, 7, 5] == array[1, 7, 5, 2]


@given(st.integers(1, 4), st.integers(5, 99), st.integers(5, 99))
def test_few_channels_are_recognised_at_either_end(channels, height, width):
    assert channels_are_last((height, width, channels))
    assert not channels_are_last((channels, height, width))
