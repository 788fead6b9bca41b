"""Small pictures whose pixels tell where they come from, folders of them, and files that only claim to be one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def coordinates(height: int, width: int, blue: int = 0) -> Image.Image:
    """Red is the row and green the column of each pixel, blue as given."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows, columns, np.full_like(rows, blue)], -1).astype(np.uint8))


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (16, 16), first: int = 0) -> Path:
    """Pictures `00.png`, `01.png`, ... that differ in blue.

    Args:
        folder: Where; made if it is not there.
        count: How many.
        size: (height, width).
        first: Number of the first one; also its blue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        coordinates(*size, blue=i).save(folder / f"{i:02d}.png")
    return folder


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
