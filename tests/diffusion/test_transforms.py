from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import coordinates
from PIL import Image
from torchvision.transforms import v2

from peft_modal_diffusion.transforms import cut, make_buckets, nearest_bucket, place

quick = settings(deadline=None, derandomize=True, max_examples=100)
SIDES = st.integers(8, 3000)
SHIFTS = st.none() | st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)
STEPS = st.sampled_from([(512, 64), (1024, 64), (768, 32), (32, 8), (64, 64), (256, 8), (520, 8)])


@quick
@given(original=st.tuples(SIDES, SIDES), target=st.tuples(st.integers(1, 900), st.integers(1, 900)), shift=SHIFTS)
def test_the_crop_lies_in_a_picture_that_covers_it_without_distortion(original, target, shift):
    placement = place(original, target, shift=shift)
    resized = placement.resized
    assert any(r == t for r, t in zip(resized, target, strict=True))
    assert all(0 <= at <= r - t for at, r, t in zip(placement.crop, resized, target, strict=True))
    scale = max(target[0] / original[0], target[1] / original[1])
    for new, old in zip(resized, original, strict=True):
        assert new <= old * scale + 1e-6
        assert new > old * scale - 1


@quick
@given(original=st.tuples(SIDES, SIDES), resolution=st.integers(8, 600))
def test_a_square_is_cut_like_the_scripts_of_diffusers_do(original, resolution):
    placement = place(original, (resolution, resolution))
    picture = torch.empty(1, *original, device="meta")
    assert placement.resized == v2.Resize(resolution)(picture).shape[1:]
    gap = [(new - resolution) / 2 for new in placement.resized]
    assert placement.crop == tuple(round(g) for g in gap)


@pytest.mark.parametrize("size", [(37, 50), (50, 37), (20, 20), (9, 40)])
def test_the_pixels_are_those_of_torchvision(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    reference = v2.Compose(
        [
            v2.Resize(24, interpolation=v2.InterpolationMode.LANCZOS),
            v2.CenterCrop(24),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    torch.testing.assert_close(cut(image, place(size, (24, 24))), reference(image).as_subclass(torch.Tensor))


def test_pixels_go_from_minus_one_to_one():
    image = Image.new("RGB", (8, 8), (0, 255, 51))
    pixels = cut(image, place((8, 8), (8, 8)))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels[:, 3, 5].tolist() == pytest.approx([-1.0, 1.0, -0.6], abs=1e-6)


@pytest.mark.parametrize(
    ("shift", "top", "left"), [((0.0, 0.0), 0, 0), ((0.9, 0.999), 0, 14), ((0.5, 0.5), 0, 7), (None, 0, 7)]
)
def test_the_crop_is_where_it_says(shift, top, left):
    placement = place((10, 24), (10, 10), shift=shift)
    assert placement.crop == (top, left)
    rows, columns, _ = ((cut(coordinates(10, 24), placement) + 1) * 127.5).round().long()
    assert rows[:, 0].tolist() == list(range(10))
    assert columns[0].tolist() == list(range(left, left + 10))


@quick
@given(shift=SHIFTS, size=st.tuples(st.integers(10, 40), st.integers(10, 40)))
def test_a_flipped_crop_is_that_of_the_flipped_picture(shift, size):
    placement = place(size, (10, 10), shift=shift, flip=True)
    whole = coordinates(*size).resize(placement.resized[::-1], Image.Resampling.LANCZOS)
    top, left = placement.crop
    mirrored = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((left, top, left + 10, top + 10))
    expected = torch.from_numpy(np.array(mirrored)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(cut(coordinates(*size), placement), expected)


@quick
@given(sizes=STEPS)
def test_buckets_keep_the_area_and_the_step(sizes):
    resolution, step = sizes
    buckets = make_buckets(resolution, step)
    assert (resolution, resolution) in buckets
    for height, width in buckets:
        assert height % step == width % step == 0
        assert 0.75 <= height * width / resolution**2 <= 1.25
        assert (width, height) in buckets
        assert max(height, width) <= 2 * resolution


def test_buckets_of_the_usual_size():
    buckets = make_buckets(512, 64)
    assert {(512, 512), (448, 576), (384, 640), (320, 768), (256, 1024)} < set(buckets)
    assert make_buckets(64, 64) == ((64, 64),)


@quick
@given(original=st.tuples(SIDES, SIDES), sizes=STEPS)
def test_no_bucket_is_nearer(original, sizes):
    buckets = make_buckets(*sizes)
    chosen = nearest_bucket(original, buckets)

    def distance(size):
        return abs(np.log(size[0] / size[1]) - np.log(original[0] / original[1]))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-9


@pytest.mark.parametrize(
    ("original", "bucket"), [((500, 500), (512, 512)), ((3000, 4000), (448, 576)), ((90, 10), (1024, 256))]
)
def test_a_picture_goes_to_the_bucket_of_its_shape(original, bucket):
    assert nearest_bucket(original, make_buckets(512, 64)) == bucket


def test_of_two_buckets_with_one_ratio_the_larger_is_taken():
    assert nearest_bucket((30, 40), ((24, 32), (48, 64))) == (48, 64)
