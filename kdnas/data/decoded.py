"""Decoded images on disk: decoded once, then read from there by whatever command asks for the same files."""

import contextlib
import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, final

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from kdnas.runs.files import Damaged, write_atomically

_FOLDER: ContextVar[Path | None] = ContextVar("decoded", default=None)
_SUFFIX = ".decoded.npy"
_MOST_BYTES = 100 * 10**9  # of all files of a folder
_SPARE_BYTES = 10**9  # that a disk has left
_CHUNK = 256  # images that are decoded at a time
_log = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], Tensor]


@contextlib.contextmanager
def stored_in(folder: str | Path | None) -> Iterator[None]:
    """Inside, images that are decoded from files are stored in a folder and read from there; None changes nothing."""
    token = _FOLDER.set(_FOLDER.get() if folder is None else Path(folder).resolve())
    try:
        yield
    finally:
        _FOLDER.reset(token)


def store() -> Path | None:
    """The folder of `stored_in`."""
    return _FOLDER.get()


@final
class Decoded:
    """The images of a part as 8-bit integers in a file that is mapped into memory.

    The pixels are those that decoding gives, to the last bit: an image that 8 bits do not hold, such as one of 16 bits,
    is decoded again each time. The name of the file is a digest of all names, sizes and times of the images' files, so
    that a changed file is never read from a stored one. It is written whole or not at all, and each image has a
    checksum.

    Args:
        path: of the file, in its folder.
        count: number of images.
        shape: of one, `(channels, height, width)`.

    Raises:
        Damaged: the file has another size or type.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...]) -> None:
        self.path = path
        try:
            self._rows: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise self._damaged(f"cannot be read ({error})") from error
        if self._rows.dtype != _row(shape) or self._rows.shape != (count,):
            raise self._damaged(f"has {self._rows.shape} rows of other images")

    @classmethod
    def of(cls, folder: Path, key: str, count: int, shape: tuple[int, ...], decode: Decode) -> "Decoded | None":
        """The stored images of a key; decoded and stored first where there are none.

        Args:
            folder: of all stored images.
            key: see `fingerprint`.
            count: number of images.
            shape: of one.
            decode: gives images by their numbers, in [0, 1].

        Returns:
            None in a process that decodes for another one, where there are none yet.

        Raises:
            ValueError: they do not fit into the folder or onto its disk, or an image cannot be decoded.
        """
        path = folder / f"{key}{_SUFFIX}"
        if not path.is_file():
            if get_worker_info() is not None:
                return None
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                words = error.strerror or str(error)
                raise ValueError(f"`decoded` must be a folder, got {folder} ({words}). Name another one.") from error
            _make_room(folder, count * _row(shape).itemsize)
            write_atomically(path, lambda draft: _write(draft, count, shape, decode))
        with contextlib.suppress(OSError):  # a folder that cannot be written can be read
            os.utime(path)
        return cls(path, count, shape)

    def take(self, indices: Sequence[int], decode: Decode) -> Tensor:
        """Images by number, those that are not stored by `decode`.

        Raises:
            Damaged: an image has another checksum than when it was stored.
        """
        rows = self._rows[list(indices)]
        images = torch.from_numpy(rows["pixels"].astype(np.float32) / 255)
        for place, row in enumerate(rows):
            if row["stored"] and zlib.crc32(row["pixels"].tobytes()) != row["check"]:
                raise self._damaged(f"has another image {indices[place]} than was stored")
        absent = [place for place, row in enumerate(rows) if not row["stored"]]
        if absent:
            images[absent] = decode([indices[place] for place in absent])
        return images

    def _damaged(self, what: str) -> Damaged:
        return Damaged(self.path, what, "Remove it: the images are decoded again.")


def fingerprint(parts: Sequence[object]) -> str:
    """A digest of what the pixels of a part follow from, and of the decoder's version."""
    digest = hashlib.blake2b(f"1 {PIL.__version__}".encode(), digest_size=16)
    for part in parts:
        digest.update(b"\0" + (part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")))
    return digest.hexdigest()


def _row(shape: tuple[int, ...]) -> np.dtype[Any]:
    return np.dtype([("check", "<u4"), ("stored", "?"), ("pixels", "u1", shape)])


def _write(draft: Path, count: int, shape: tuple[int, ...], decode: Decode) -> None:
    rows = np.lib.format.open_memmap(draft, mode="w+", dtype=_row(shape), shape=(count,))
    inexact = 0
    _log.info(f"{count} images are decoded once and stored in {draft.parent}: {rows.nbytes / 1e9:.1f} GB")
    for start in range(0, count, _CHUNK):
        numbers = range(start, min(count, start + _CHUNK))
        images = decode(numbers).numpy()
        whole = np.round(images * 255).astype(np.uint8)
        exact = (whole.astype(np.float32) / 255 == images).reshape(len(whole), -1).all(1)
        for number, pixels, is_exact in zip(numbers, whole, exact, strict=True):
            rows[number] = (zlib.crc32(pixels.tobytes()), is_exact, pixels)
        inexact += int((~exact).sum())
    rows.flush()
    if inexact:
        _log.warning(f"{inexact} of {count} images have more than 8 bits: they are decoded again each time.")


def _make_room(folder: Path, size: int) -> None:
    """Remove the files that were not used for longest, so that one of so many bytes fits within the bound.

    Raises:
        ValueError: it is larger than the bound, or than what the disk has left.
    """
    if size > _MOST_BYTES:
        raise ValueError(
            f"the decoded images take {size / 1e9:.0f} GB, more than the {_MOST_BYTES / 1e9:.0f} GB that are stored. "
            "Drop --decoded: processes decode them ahead of need (--decoders)."
        )
    files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in files)
    while files and total + size > _MOST_BYTES:
        total -= files[0].stat().st_size
        files.pop(0).unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if size + _SPARE_BYTES > free:
        raise ValueError(
            f"the decoded images take {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left, of which 1 GB is "
            "spared. Name a folder on another disk, or drop --decoded."
        )
