"""A PNG that declares 30,000 x 60,000 pixels among small ones: refused by its name, not by the decoder's exception."""

import struct
import zlib

from PIL import Image

from kdnas.data.folders import folder as image_folder
from tests.cases import outcome


def png(width, height):
    """A PNG whose header declares this size, with hardly any data."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def check(folder):
    for name in ("left", "right"):
        (folder / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / name / f"{i}.png")
    (folder / "right" / "scan.png").write_bytes(png(60_000, 30_000))
    outcome(lambda: image_folder(str(folder)), "scan.png", raw=Image.DecompressionBombError)
