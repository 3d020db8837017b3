import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.data.files import FileImages, pixels_of, problems, sides


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(source, mode="RGB", size=4):
    return FileImages([source], torch.zeros(1), size, mode).take(torch.tensor([0]))[0]


def palette(transparent):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 255, 51, 0])
    return encoded(picture, "PNG", **({"transparency": bytes([255, 0])} if transparent else {}))


@pytest.mark.parametrize(
    ("source", "colour"),
    [
        (encoded(Image.fromarray(np.full((4, 4), 13_107, np.uint16)), "PNG"), (0.2, 0.2, 0.2)),
        (encoded(Image.fromarray(np.full((4, 4), 13_107, np.uint16)), "TIFF"), (0.2, 0.2, 0.2)),
        (encoded(Image.fromarray(np.full((4, 4), 0.2, np.float32)), "TIFF"), (0.2, 0.2, 0.2)),
        (encoded(Image.new("1", (4, 4), 1), "PNG"), (1, 1, 1)),
        (encoded(Image.new("L", (4, 4), 51), "PNG"), (0.2, 0.2, 0.2)),
        (encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"), (1, 1, 1)),
        (encoded(Image.new("RGBA", (4, 4), (255, 51, 0, 255)), "PNG"), (1, 0.2, 0)),
        (encoded(Image.new("RGBA", (4, 4), (255, 51, 0, 0)), "PNG"), (1, 1, 1)),
        (encoded(Image.new("CMYK", (4, 4), (0, 204, 255, 0)), "TIFF"), (1, 0.2, 0)),
        (palette(transparent=False), (1, 0.2, 0)),
        (palette(transparent=True), (1, 1, 1)),
    ],
)
def test_a_file_is_decoded_to_what_it_holds(source, colour):
    expected = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(decoded(source), expected, atol=1e-6, rtol=0)


def test_what_is_transparent_in_16_bits_is_white():
    picture = Image.fromarray(np.array([[819, 52_428]], np.uint16))
    picture.info["transparency"] = 819
    assert pixels_of(picture).tolist() == [[[1.0, pytest.approx(0.8)]]]


def test_twelve_bits_are_divided_by_their_largest_value():
    picture = Image.fromarray(np.full((4, 4), 819, np.uint16))
    picture.tag_v2 = {258: (12,)}
    picture.getexif = Image.Exif
    assert float(pixels_of(picture).max()) == pytest.approx(0.2)


def test_a_picture_is_turned_as_its_exif_data_say():
    picture = Image.new("RGB", (8, 4))
    picture.paste((255, 255, 255), (0, 0, 4, 4))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    pixels = pixels_of(Image.open(io.BytesIO(encoded(picture, "PNG", exif=exif))))
    assert pixels.shape == (3, 8, 4)
    assert pixels[:, :4].min() == 1 and pixels[:, 4:].max() == 0


def test_a_gray_picture_of_16_bits_is_resized_in_its_precision():
    ramp = np.tile(np.arange(16, dtype=np.uint16) + 1000, (16, 1))
    shrunk = decoded(encoded(Image.fromarray(ramp), "PNG"), "L", 8)
    assert shrunk.shape == (1, 8, 8)
    assert 1000 / 65_535 < float(shrunk.min()) < float(shrunk.max()) < 1016 / 65_535
    assert len(shrunk.unique()) == 8


def test_what_cannot_be_decoded_is_named_with_the_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"no image")
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    (tmp_path / "short.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / "wide.tif")
    Image.fromarray(np.full((4, 4), 255, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    pages = [Image.new("L", (4, 4), 9 * i) for i in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.new("L", (4, 4)).save(tmp_path / "whole.png")
    reasons = {
        "pipe.png": "no file",
        "gone.png": "leads nowhere",
        "empty.png": "is empty",
        "text.png": "no known image format",
        "short.jpg": "truncated",
        "wide.tif": "32-bit integers",
        "float.tif": r"floats must be in \[0, 1\], got 255",
        "nan.tif": r"floats must be in \[0, 1\]",
        "pages.tif": "holds 3 pages",
    }
    sentences = problems([tmp_path / name for name in [*reasons, "whole.png"]])
    assert len(sentences) == len(reasons)
    for (name, reason), sentence in zip(reasons.items(), sentences, strict=True):
        assert sentence.startswith(f"{tmp_path / name} cannot be read: ") and sentence.count("\n") == 0
        with pytest.raises(ValueError, match=reason):
            decoded(tmp_path / name)


def test_a_picture_that_is_only_large_enough_for_a_warning_is_refused(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    warnings.simplefilter("default")  # as outside of the tests
    assert "more than" in problems([tmp_path / "large.png"])[0]


def test_what_pillow_only_warns_of_is_read():
    broken = bytearray(encoded(Image.new("RGB", (4, 4), (255, 51, 0)), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(decoded(bytes(broken)).mean()) == pytest.approx(0.4, abs=0.01)


def test_sides_are_read_from_the_headers():
    assert sides([encoded(Image.new("L", (9, 5)), "PNG"), encoded(Image.new("L", (3, 7)), "PNG")]) == [5, 3]


def test_the_digest_follows_names_labels_and_content(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (4, 4), 7).save(tmp_path / f"{name}.png")
    part = lambda labels: FileImages([tmp_path / "a.png", tmp_path / "b.png"], torch.tensor(labels), 4)  # noqa: E731
    first = part([0, 1]).digest()
    assert part([0, 1]).digest() == first != part([1, 0]).digest()
    Image.new("L", (4, 4), 8).save(tmp_path / "b.png")
    assert part([0, 1]).digest() != first
