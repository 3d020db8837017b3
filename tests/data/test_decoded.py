"""Images that are stored once they are decoded: the same bits, whole files, never those of other files."""

import os
import pickle
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.data import decoded
from kdnas.data.base import Data
from kdnas.data.decoded import Decoded, store, stored_in
from kdnas.data.feeding import Feed, Steps
from kdnas.data.files import FileImages, Piece
from kdnas.jobs import commands
from kdnas.runs.files import Damaged
from tests.toy import part

COUNT, SIDE = 6, 8


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    paths = [tmp_path / "images" / f"{number}.png" for number in range(COUNT)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return paths


def images(sources, mode="RGB"):
    return FileImages(sources, torch.arange(len(sources)) % 2, SIDE, mode)


def stored(folder):
    return sorted(folder.glob("*.npy"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_stored_images_have_the_same_bits_and_are_decoded_once(files, tmp_path, monkeypatch, mode):
    expected, order = images(files, mode).take(torch.arange(COUNT)), torch.tensor([4, 0, 4, 5])
    with stored_in(tmp_path / "store"):
        assert torch.equal(images(files, mode).take(order), expected[order])
        monkeypatch.setattr(FileImages, "_decode", None)
        again = images(files, mode)
        assert torch.equal(again.take(order), expected[order]) and torch.equal(again.take(order[:1]), expected[4:5])
    assert len(stored(tmp_path / "store")) == 1


def test_images_of_more_than_eight_bits_are_decoded_each_time(files, tmp_path, caplog):
    Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) * 601).save(files[2])
    expected = images(files).take(torch.arange(COUNT))
    with stored_in(tmp_path / "store"):
        for _ in range(2):
            assert torch.equal(images(files).take(torch.arange(COUNT)), expected)
    assert "1 of 6 images have more than 8 bits" in caplog.text


def test_a_changed_file_is_not_read_from_what_was_stored(files, tmp_path):
    with stored_in(tmp_path / "store"):
        images(files).take(torch.arange(COUNT))
        before = files[0].stat()
        content = bytearray(files[0].read_bytes())
        Image.new("RGB", (12, 9), "red").save(files[0], compress_level=0)
        files[0].write_bytes(files[0].read_bytes().ljust(len(content), b"\0"))
        os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert torch.equal(images(files).take(torch.tensor([0])), images(files)._images([0]))
    assert len(stored(tmp_path / "store")) == 2


def test_pieces_are_known_by_their_file_and_copies_and_bytes_by_their_content(files, tmp_path):
    content = files[0].read_bytes()
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(content)
    pieces = [
        Piece(tmp_path / name, 0, len(content), "row 0", copied) for name in ("first", "second") for copied in (0, 1)
    ]
    keys = [images([source])._fingerprint() for source in (*pieces, content)]
    assert keys[0] != keys[2] and keys[1] == keys[3] == keys[4] and len({*keys}) == 3


@pytest.mark.parametrize("size", [0, 60, -1])
def test_a_damaged_file_is_refused_in_a_sentence(files, tmp_path, size):
    with stored_in(tmp_path / "store"):
        images(files).take(torch.arange(COUNT))
        (path,) = stored(tmp_path / "store")
        content = bytearray(path.read_bytes())
        if size < 0:
            content[-5] ^= 16
        path.write_bytes(content if size < 0 else content[:size])
        with pytest.raises(Damaged, match=r"\.npy is damaged: .*Remove it: the images are decoded again"):
            images(files).take(torch.arange(COUNT))


def test_a_row_of_other_images_is_refused(files, tmp_path):
    with stored_in(tmp_path / "store"):
        images(files).take(torch.arange(COUNT))
    with pytest.raises(Damaged, match="rows of other images"):
        Decoded(stored(tmp_path / "store")[0], COUNT + 1, (3, SIDE, SIDE))


def test_what_is_not_decoded_to_the_end_is_not_stored(files, tmp_path, monkeypatch):
    files[-1].write_bytes(b"no image")
    monkeypatch.setattr(decoded, "_CHUNK", 2)
    with stored_in(tmp_path / "store"), pytest.raises(ValueError, match=r"5\.png cannot be read"):
        images(files).take(torch.tensor([0]))
    assert not list((tmp_path / "store").iterdir())


def test_a_file_is_no_folder_to_store_in(files):
    with stored_in(files[1]), pytest.raises(ValueError, match=r"`decoded` must be a folder, got .*1\.png"):
        images(files).take(torch.tensor([0]))


def test_the_folder_is_bounded_and_what_was_not_used_for_longest_goes(files, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "_MOST_BYTES", 1000)
    with stored_in(tmp_path):
        for number in (0, 1, 0, 2):  # 325 bytes each
            images(files[number : number + 1]).take(torch.tensor([0]))
            for path in stored(tmp_path):
                os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
        images(files[3:4]).take(torch.tensor([0]))
        left = [tmp_path / f"{images(files[number : number + 1])._fingerprint()}.decoded.npy" for number in (0, 2, 3)]
        assert stored(tmp_path) == sorted(left)  # image 1 is the one that was used first
        monkeypatch.setattr(decoded, "_MOST_BYTES", 100)
        with pytest.raises(ValueError, match=r"take 0 GB, more than the 0 GB .* Drop --decoded"):
            images(files[4:5]).take(torch.tensor([0]))
    monkeypatch.setattr(decoded, "_MOST_BYTES", 10**6)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9 + 10))
    with stored_in(tmp_path), pytest.raises(ValueError, match=r"has 1\.0 GB left, .* Name a folder on another disk"):
        images(files[4:5]).take(torch.tensor([0]))


def test_processes_that_decode_read_what_this_one_has_stored(files, tmp_path):
    data = Data(images(files), part(6, "search", 2), part(6, "test", 2), class_names=("a", "b"))
    with closing(Feed(Steps(data, 0, 2), 4, 0)) as feed:
        expected = [feed(step) for step in range(3)]
    with stored_in(tmp_path / "store"), closing(Feed(Steps(data, 0, 2), 4, 1)) as feed:
        first = feed(0)
        (path,) = stored(tmp_path / "store")
        assert all(torch.equal(a, b) for a, b in zip([first, feed(1), feed(2)], expected, strict=True))
        assert len(pickle.dumps(data.train)) < path.stat().st_size + 3000
        assert pickle.loads(pickle.dumps(data.train))._stored is None


def test_the_option_names_the_folder_for_one_command(tmp_path):
    @commands._computes
    def probe(*, decoded: str | Path | None = None) -> Path | None:
        return store()

    assert probe(decoded=tmp_path) == tmp_path.resolve() and probe() is None and store() is None
