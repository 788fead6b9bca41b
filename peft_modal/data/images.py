"""One RGB picture out of one image file, whatever its kind, orientation and depth."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from peft_modal.errors import DataError

SUFFIXES: Final = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm",
    ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Endings of the files that `read_image` is for; upper and lower case. What a file is, its content says."""

MAX_MEGAPIXELS: Final = 100
MIN_SIDE: Final = 8
"""Shorter sides, in pixels, are refused: such files are placeholders, and enlarged they teach a smear."""

_FORMATS: Final = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""What Pillow decodes by itself. Not PostScript and its like: they are programs, run by another one."""


def read_image(path: str | Path) -> Image.Image:
    """The picture of a file as 8-bit RGB, upright as its EXIF orientation says.

    Transparent parts are laid over white. 16-bit gray is scaled to 8 bits, floating-point gray from 0..1. Of an
    animation the first frame is taken, of a file with several pages the first. Colour profiles are not applied.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing, no image, damaged, below `MIN_SIDE` or above `MAX_MEGAPIXELS`; the latter is
            seen before anything is decoded.
    """
    path = Path(path)
    with _opened(path) as image:
        image.load()
        return _upright(_rgb(image, path), _orientation(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `read_image` returns, in pixels; nothing is decoded.

    Raises:
        DataError: As for `read_image`, as far as the header tells.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        # Pillow has turned the size of a TIFF already, and would decode a PNG to look for what may follow its pixels.
        if image.format == "TIFF" or (isinstance(image, PngImageFile) and not _may_have_exif(image)):
            return height, width
        return (width, height) if _orientation(image) in {5, 6, 7, 8} else (height, width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read; whatever goes wrong with it in the block is a `DataError` with its name.

    Yields:
        The image, not yet decoded.

    Raises:
        DataError: See `read_image`.
    """
    if not path.is_file():
        raise DataError(f"'{path}' does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty.")
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            # Pillow's own limit warns from 90 megapixels on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(stream, formats=_FORMATS) as image:
                _check_size(path, *image.size)
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise DataError(_too_large(path, int(pixels[0]) if pixels else 0)) from error
    except UnidentifiedImageError as error:
        raise DataError(f"'{path}' is no image that can be read here: {', '.join(_FORMATS)}.") from error
    except Exception as error:  # Pillow's decoders let every kind of error out of a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{path}' is damaged or cannot be read: {reason}") from error


def _check_size(path: Path, width: int, height: int) -> None:
    """Refuse what is too large to decode or too small to be meant.

    Raises:
        DataError: It is.
    """
    if width * height > MAX_MEGAPIXELS * 10**6:
        raise DataError(_too_large(path, width * height))
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"'{path}' has {width}x{height} pixels, expected {MIN_SIDE} or more on its shorter side; leave it out."
        )


def _too_large(path: Path, pixels: int) -> str:
    return (
        f"'{path}' has {pixels / 1e6:.0f} megapixels, the most that is read is {MAX_MEGAPIXELS}; "
        "scale it down or leave it out."
    )


def _may_have_exif(png: PngImageFile) -> bool:
    """Whether a PNG has an EXIF block before its pixels, or anything behind them."""
    if {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & png.info.keys():
        return True
    stream = png.fp
    assert stream is not None  # it is closed with the file only
    position = stream.tell()
    stream.seek(8)
    kinds = []
    while len(head := stream.read(8)) == 8:
        kinds.append(head[4:])
        stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    stream.seek(position)
    return bool({*kinds[kinds.index(b"IDAT") :]} - {b"IDAT", b"IEND"})


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; of a decoded TIFF always 1, Pillow has turned it."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    # The rest of the EXIF block is dropped first: `exif_transpose` writes it anew, which fails where it is damaged.
    image.info.clear()
    image.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        image = _gray(image, path)
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _gray(image: Image.Image, path: Path) -> Image.Image:
    """Gray of more than 8 bits, scaled to 8 bits; what is transparent becomes white.

    Raises:
        DataError: Its values are outside of 0..65535, or outside of 0..1 where they are floating-point numbers.
    """
    values = np.asarray(image)
    highest, kind = (1, "floating-point") if image.mode == "F" else (65535, "integer")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= highest):  # also true of NaN
        raise DataError(f"'{path}' holds {kind} values from {low:g} to {high:g}, expected 0 to {highest}.")
    scaled = np.rint(values.astype(np.float64) * (255 / highest)).astype(np.uint8)
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled)
