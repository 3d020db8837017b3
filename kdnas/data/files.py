"""Images decoded from files: each to the brightness that it holds, or refused by its name."""

import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from kdnas.data.base import Images
from kdnas.data.decoded import Decoded, fingerprint, store
from kdnas.data.feeding import cores
from kdnas.plain import printable, reason
from kdnas.tasks.base import Task
from kdnas.tasks.classification import CLASSIFICATION

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .webp .avif .gif .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .tga".split()
)
"""Suffixes of files that count as images."""
_MOST_BYTES = 2**31  # of a file of arrays, unpacked
_MOST_THREADS = 8


@final
@dataclass(frozen=True)
class Piece:
    """An encoded picture within a larger file: a tar, or a table.

    Attributes:
        path: the file.
        start: of its first byte.
        size: number of its bytes.
        name: what it is called there, for messages.
        copied: whether the file is a copy of this process, whose name and time say nothing.
    """

    path: Path
    start: int
    size: int
    name: str
    copied: bool = False

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        with self.path.open("rb") as handle:
            handle.seek(self.start)
            return handle.read(self.size)

    def __str__(self) -> str:
        return self.name


Source = Path | bytes | Piece


@final
class FileImages(Images):
    """Images decoded from files (or encoded bytes) by `take`, in one size.

    Pixels are 0 to 1 of what the format can hold: of 8 and 16 bits, or floats in [0, 1]. Pictures are turned as their
    EXIF data say, and what is transparent is white. Of several frames the first counts.

    Args:
        sources: files, or their bytes.
        labels: one per file, of the task.
        size: side of a square, to which images are resized and centre-cropped; or height and width, to which they are
            resized.
        mode: `RGB` or `L`.
        task: what the labels are for.

    Raises:
        ValueError: from `take`, for a file that is no image or none that can be shown in [0, 1]; the message names it.
    """

    is_decoded = True

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Tensor,
        size: int | tuple[int, int],
        mode: str = "RGB",
        task: Task = CLASSIFICATION,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.sources, self.labels, self.size, self.mode = sources, task.as_labels(labels, len(sources)), size, mode
        self.task, self.shape = task, (1 if mode == "L" else 3, height, width)
        self._stored: tuple[Path, Decoded] | None = None

    def take(self, indices: Tensor) -> Tensor:
        """Images by index; see `kdnas.data.decoded` for those that are stored."""
        folder, numbers = store(), indices.tolist()
        if folder is None or not numbers:
            return self._images(numbers)
        if self._stored is None or self._stored[0] != folder:
            decoded = Decoded.of(folder, self._fingerprint(), len(self), self.shape, self._images)
            if decoded is None:
                return self._images(numbers)
            self._stored = folder, decoded
        return self._stored[1].take(numbers, self._images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stored": None}  # a copy maps the file itself

    def _images(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack(list(each_of(self._decode, [self.sources[i] for i in numbers])))

    def _fingerprint(self) -> str:
        """Of names, sizes and times of all files, or of the content of what is in no file of its own."""
        return fingerprint([self.size, self.mode, *(part for source in self.sources for part in _identity(source))])

    def digest(self) -> str:
        """Of labels, names and sizes of all files, and the content of 256 of them, evenly spread."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=8)
        for number, source in enumerate(self.sources):
            name = "/".join(source.parts[-2:]) if isinstance(source, Path) else str(number)
            digest.update(f"{name} {_size(source)} ".encode())
        for number in torch.linspace(0, len(self) - 1, min(256, len(self))).long().tolist():
            source = self.sources[number]
            digest.update(_bytes(source))
        return digest.hexdigest()

    def _decode(self, source: Source) -> Tensor:
        with opened(source) as picture:
            return torch.from_numpy(pixels_of(picture, self.mode, self.size))


def _identity(source: Source) -> tuple[object, ...]:
    if isinstance(source, Path):
        status = source.stat()
        return (source.resolve(), status.st_size, status.st_mtime_ns)
    if isinstance(source, Piece) and not source.copied:
        return (*_identity(source.path), source.start, source.size)
    return (hashlib.blake2b(_bytes(source), digest_size=16).digest(),)


def problems(sources: Sequence[Source]) -> list[str]:
    """A sentence for each of the files that cannot be decoded."""
    return [sentence for sentence in each_of(_problem, sources) if sentence]


def _problem(source: Source) -> str:
    try:
        with opened(source) as picture:
            pixels_of(picture)
    except ValueError as error:
        return str(error)
    return ""


def sides(sources: Sequence[Source]) -> list[int]:
    """The shorter side of each picture in pixels, read from its header.

    Raises:
        ValueError: a file that cannot be opened; the message names it.
    """

    def side(source: Source) -> int:
        with opened(source) as picture:
            return min(picture.size)

    return list(each_of(side, sources))


def each_of(function: Callable[[Any], Any], sources: Sequence[Any]) -> Iterator[Any]:
    """The function of each source, in order: in threads, but for a process that is one of several which decode."""
    threads = 1 if get_worker_info() else min(_MOST_THREADS, cores())
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        # What Pillow only warns of, such as damaged EXIF data, leaves the pixels as they are; a picture of more than
        # 89 million pixels is refused.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield from map(function, sources) if threads == 1 else pool.map(function, sources)


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """The picture of a file.

    Raises:
        ValueError: it cannot be opened, or what is done with it inside fails; the message names it.
    """
    name = "an image" if isinstance(source, bytes) else printable(str(source))
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would block
            raise ValueError("it is no file" if source.exists() else "it leads nowhere")
        with Image.open(source if isinstance(source, Path) else io.BytesIO(_bytes(source))) as picture:
            yield picture
    except Image.UnidentifiedImageError:
        words = "it is empty" if _is_empty(source) else "it is in no known image format"
        raise ValueError(f"{name} cannot be read: {words}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"{name} cannot be read: it has more than {limit} million pixels.") from None
    except Exception as error:  # a decoder that is handed damaged data may raise anything
        raise ValueError(f"{name} cannot be read: {reason(error)}.") from error


def _is_empty(source: Source) -> bool:
    return not _size(source)


def _size(source: Source) -> int:
    if isinstance(source, Path):
        return source.stat().st_size
    return len(source) if isinstance(source, bytes) else source.size


def _bytes(source: Source) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def pixels_of(picture: Image.Image, mode: str = "", size: int | tuple[int, int] = 0) -> np.ndarray:
    """The pixels of a picture, `[channels, height, width]`, float32 in [0, 1].

    It is turned as its EXIF data say. Gray of 8, 12 and 16 bits is divided by the largest value; floats are taken as
    they are; colours of any model become red, green and blue; what is transparent is white.

    Args:
        picture: from Pillow.
        mode: `RGB`, `L`, or empty for the picture's own: `L` for gray, else `RGB`.
        size: side of a square, to which it is resized (bicubic) and cropped, or height and width, to which it is
            resized; 0 leaves its size.

    Raises:
        ValueError: 32-bit integers, whose largest value is unknown, or floats outside [0, 1].
    """
    _check_pages(picture)
    bits = getattr(picture, "tag_v2", {}).get(258, (16,))[0]
    picture = ImageOps.exif_transpose(picture)
    picture = _deep(picture, bits) if picture.mode.startswith(("I", "F")) else _opaque(picture)
    own = "L" if picture.mode in ("1", "L", "F") else "RGB"
    if picture.mode != "F":
        picture = picture.convert(mode or own)
    array = np.asarray(_sized(picture, size) if size else picture, np.float32)
    array = array.clip(0, 1) if picture.mode == "F" else array / 255
    if array.ndim == 3:
        return array.transpose(2, 0, 1).copy()
    return np.repeat(array[None], 3, 0) if mode == "RGB" else array[None]


def _check_pages(picture: Image.Image) -> None:
    """Raise a ValueError for a TIFF of several pages of one size; smaller ones are previews."""
    if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1:
        size, count = picture.size, getattr(picture, "n_frames", 1)
        picture.seek(1)
        if picture.size == size:
            raise ValueError(f"it holds {count} pages. Write each into a file of its own")
        picture.seek(0)


def _deep(picture: Image.Image, bits: int) -> Image.Image:
    """Gray of more than 8 bits as floats in [0, 1]."""
    array = np.asarray(picture)
    low, high = float(array.min()), float(array.max())
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its floats must be in [0, 1], got {low:.3g} to {high:.3g}")
        return picture
    if bits > 16 or low < 0 or high > 65_535:
        raise ValueError("its 32-bit integers have no known largest value. Write it with 8 or 16 bits")
    pixels = array.astype(np.float32) / (2**bits - 1)
    pixels[array == picture.info.get("transparency", -1)] = 1
    return Image.fromarray(pixels)


def _opaque(picture: Image.Image) -> Image.Image:
    """On white, where it has transparency."""
    if "transparency" not in picture.info and picture.mode not in ("LA", "PA", "RGBA", "La", "RGBa"):
        return picture
    if picture.mode in ("La", "RGBa"):  # multiplied by alpha: these are the conversions that there are
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    own = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(own)


def _sized(picture: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resized so that the shorter side has this many pixels, and cropped to the centre; or to height and width."""
    if not isinstance(size, int):
        height, width = size
        same = picture.size == (width, height)
        return picture if same else picture.resize((width, height), Image.Resampling.BICUBIC)
    scale = size / min(picture.size)
    if scale != 1:
        wide = [max(size, round(side * scale)) for side in picture.size]
        picture = picture.resize((wide[0], wide[1]), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, read without pickle.

    Raises:
        ValueError: it is damaged, holds objects, or takes more than 2 GiB unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it takes {size:,} bytes, more than {_MOST_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # damaged headers and streams end in errors of zip, of its compressors, and of Python
        raise ValueError(reason(error)) from error
