from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from image_folders import chunk, header_of_png
from PIL import Image

from peft_modal.data.images import MAX_MEGAPIXELS, MIN_SIDE, image_size, read_image
from peft_modal.errors import DataError

quick = settings(
    deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = st.tuples(st.integers(8, 24), st.integers(8, 24))
PICTURES = SIZES.flatmap(lambda size: hnp.arrays(np.uint8, (*size, 3)))
LOSSLESS = ("bmp", "png", "tiff", "webp", "tga", "ppm", "qoi", "jp2")
DAMAGED = ("avif", "bmp", "gif", "ico", "jp2", "jpg", "pcx", "png", "pgm", "qoi", "tga", "tiff", "webp")


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that lossy compression leaves nearly as it is: a ramp down, one across, and blue."""
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([down * 255 / height, across * 255 / width, np.full_like(down, 200)], -1).astype(np.uint8)


def save(values: np.ndarray, path: Path, mode: str = "RGB", **options) -> Path:
    image = Image.fromarray(values)
    image = image if image.mode == mode or mode.startswith("I") else image.convert(mode)
    lossless = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(path.suffix[1:], {})
    image.save(path, **lossless, **options)
    return path


def read(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    assert image_size(path) == (image.height, image.width)
    return np.asarray(image)


@quick
@given(values=PICTURES, ending=st.sampled_from(LOSSLESS))
def test_a_lossless_file_comes_back_bit_for_bit(tmp_path, values, ending):
    np.testing.assert_array_equal(read(save(values, tmp_path / f"a.{ending}")), values)


@quick
@given(values=PICTURES, orientation=st.integers(1, 8), ending=st.sampled_from(["png", "tiff", "webp"]))
def test_the_exif_orientation_is_undone(tmp_path, values, orientation, ending):
    # What a camera stores when the scene is `values` and it was held this way; the transforms are their own inverses
    # but for the two quarter turns.
    stored = {
        1: lambda v: v,
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.swapaxes(0, 1),
        6: lambda v: np.rot90(v, 1),
        7: lambda v: np.rot90(v, 2).swapaxes(0, 1),
        8: lambda v: np.rot90(v, -1),
    }[orientation](values)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(np.ascontiguousarray(stored), tmp_path / f"a.{ending}", exif=exif)
    np.testing.assert_array_equal(read(path), values)


def test_an_exif_block_behind_the_pixels_counts_as_well(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = picture()
    path = save(np.ascontiguousarray(np.rot90(values, 1)), tmp_path / "a.png")
    content, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
    path.write_bytes(content + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end)
    np.testing.assert_array_equal(read(path), values)


def test_the_size_of_a_png_is_told_without_its_pixels(tmp_path):
    path = save(picture(300, 200), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:100])
    assert image_size(path) == (300, 200)


@pytest.mark.parametrize("ending", ["jpg", "avif"])
def test_a_rotated_photo_is_turned_once(tmp_path, ending):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = smooth()
    path = save(np.ascontiguousarray(np.rot90(values, 1)), tmp_path / f"a.{ending}", quality=95, exif=exif)
    assert np.abs(read(path).astype(int) - values).mean() < 4


@quick
@given(values=SIZES.flatmap(lambda size: hnp.arrays(np.uint16, size)), ending=st.sampled_from(["png", "tiff", "pgm"]))
def test_16_bit_gray_is_scaled(tmp_path, values, ending):
    path = save(values, tmp_path / f"a.{ending}", "I;16")
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(read(path), np.repeat(expected[..., None], 3, 2))


def test_floating_point_gray_is_scaled_from_0_to_1(tmp_path):
    values = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    np.testing.assert_array_equal(read(save(values, tmp_path / "a.tiff", "F"))[..., 1], np.rint(values * 255))


@quick
@given(values=SIZES.flatmap(lambda size: hnp.arrays(np.uint8, (*size, 4))), ending=st.sampled_from(["png", "tiff"]))
def test_what_is_transparent_lies_on_white(tmp_path, values, ending):
    colour, alpha = values[..., :3].astype(float), values[..., 3:] / 255
    expected = colour * alpha + 255 * (1 - alpha)
    assert np.abs(read(save(values, tmp_path / f"a.{ending}", "RGBA")) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "ending", "expected"),
    [
        ("L", "png", (81, 81, 81)),
        ("LA", "png", (81, 81, 81)),
        ("P", "png", (51, 102, 51)),
        ("CMYK", "tiff", (51, 102, 51)),
        ("YCbCr", "tiff", (51, 102, 51)),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, ending, expected):
    # A colour of the palette that Pillow takes by itself; 81 is its brightness by ITU-R 601-2.
    path = save(np.full((10, 12, 3), (51, 102, 51), dtype=np.uint8), tmp_path / f"a.{ending}", mode)
    assert np.abs(read(path).reshape(-1, 3).astype(int) - expected).max() <= 2  # YCbCr rounds


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    values = smooth()
    path = save(values, tmp_path / "a.jpg", "CMYK", quality=95)
    assert np.abs(read(path).astype(int) - values).mean() < 4


def test_one_bit_is_black_and_white(tmp_path):
    values = np.indices((10, 10)).sum(0) % 2 * 255
    assert (read(save(values.astype(np.uint8), tmp_path / "a.png", "1"))[..., 0] == values).all()


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_a_transparent_palette_entry_is_white(tmp_path, ending):
    image = Image.new("P", (10, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 5, 10))
    image.save(tmp_path / f"a.{ending}", transparency=0)
    values = read(tmp_path / f"a.{ending}")
    assert values[0, 0].tolist() == [255, 255, 255]
    assert values[0, 9].tolist() == [0, 0, 255]


@pytest.mark.parametrize(("mode", "gray"), [("L", 200), ("I;16", 200 * 257)])
def test_a_transparent_gray_is_white(tmp_path, mode, gray):
    image = Image.new(mode, (10, 10), 0)
    image.paste(gray, (5, 0, 10, 10))
    image.save(tmp_path / "a.png", transparency=0)
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == [255] * 5 + [200] * 5


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_an_animation_gives_its_first_frame(tmp_path, ending):
    frames = [Image.new("RGB", (10, 9), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert set(map(tuple, read(tmp_path / f"a.{ending}").reshape(-1, 3).tolist())) == {(255, 0, 0)}


def test_the_content_decides_not_the_ending(tmp_path):
    save(picture(), tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), picture())


def test_a_damaged_exif_block_costs_the_orientation_only(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010E] = "described"
    block = bytearray(exif.tobytes())
    block[-12:] = b"\xff" * 12
    path = save(picture(), tmp_path / "a.png", exif=bytes(block))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(read(path), picture())


@pytest.mark.parametrize("function", [read_image, image_size])
@pytest.mark.parametrize(
    ("width", "height", "megapixels"), [(20000, 10000, 200), (10001, 10000, 100), (2**31 - 1, 2**31 - 1, 4611686014132)]
)
@pytest.mark.filterwarnings("error")
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, function, width, height, megapixels):
    path = tmp_path / "bomb.png"
    path.write_bytes(header_of_png(width, height))
    with pytest.raises(DataError, match=f"'{path}' has {megapixels} megapixels, the most that is read is 100"):
        function(path)


@pytest.mark.filterwarnings("error")
def test_the_largest_size_passes_the_header(tmp_path):
    (tmp_path / "large.png").write_bytes(header_of_png(10**4, MAX_MEGAPIXELS * 100))
    assert image_size(tmp_path / "large.png") == (10**4, 10**4)


@pytest.mark.parametrize("function", [read_image, image_size])
@pytest.mark.parametrize("size", [(1, 1), (MIN_SIDE - 1, 400), (400, MIN_SIDE - 1)])
def test_a_placeholder_is_refused(tmp_path, function, size):
    path = save(picture(*size), tmp_path / "dot.png")
    with pytest.raises(DataError, match=rf"dot.png' has {size[1]}x{size[0]} pixels, expected 8 or more") as caught:
        function(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no image at all", "is no image that can be read here: AVIF, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "is no image that can be read here"),
        (header_of_png(20, 20), "is damaged or cannot be read: image file is truncated"),
    ],
    ids=["empty", "text", "postscript", "header-only"],
)
def test_what_is_no_image_is_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_half_a_file_is_refused(tmp_path, ending):
    path = save(picture(64, 64), tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"a.{ending}' is "):
        read_image(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((9, 9), -3, np.int32), "integer values from -3 to -3, expected 0 to 65535"),
        (np.full((9, 9), 70000, np.int32), "integer values from 70000 to 70000"),
        (np.full((9, 9), 1.5, np.float32), "floating-point values from 1.5 to 1.5, expected 0 to 1"),
        (np.full((9, 9), np.nan, np.float32), "floating-point values from nan"),
    ],
)
def test_gray_values_without_a_known_range_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("function", [read_image, image_size])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, function):
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", "missing.png"):
        with pytest.raises(DataError, match=f"{name}' does not exist or is not a file"):
            function(tmp_path / name)


@settings(quick, max_examples=100)
@given(content=st.binary(max_size=300))
def test_garbage_ends_in_a_data_error(tmp_path, content):
    path = tmp_path / "garbage"
    path.write_bytes(content)
    check_only_data_errors(path)


@settings(quick, max_examples=200)
@given(data=st.data(), ending=st.sampled_from(DAMAGED))
def test_a_damaged_file_ends_in_a_data_error_or_in_a_picture(tmp_path, data, ending):
    path = save(picture(9, 13), tmp_path / f"damaged.{ending}")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    check_only_data_errors(path)


@settings(quick, max_examples=60)
@given(data=st.data())
def test_a_damaged_exif_block_never_ends_in_another_error(tmp_path, data):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    block = bytearray(exif.tobytes())
    for _ in range(data.draw(st.integers(1, 6))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    path = save(picture(), tmp_path / "a.jpg", exif=bytes(block))
    check_only_data_errors(path)


def check_only_data_errors(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            height, width = image_size(path)
            image = read_image(path)
        except DataError as error:
            message = str(error)
        else:
            assert image.mode == "RGB"
            assert (image.height, image.width) == (height, width)
            return
    assert str(path) in message
