"""From a picture to the square or the bucket that the network is trained on: resize, crop, flip, scale to [-1, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]
"""(height, width) in pixels."""

_AREA_TOLERANCE = 0.25


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a training picture come from; all in pixels."""

    original: Size
    resized: Size
    """Of the whole picture; covers the target, with one side equal to it."""
    target: Size
    top: int
    left: int
    """Of the crop in the resized picture."""
    is_flipped: bool = False
    """Whether the crop is mirrored left to right."""

    @property
    def crop(self) -> tuple[int, int]:
        """(top, left) of the crop, in the mirrored picture where it is flipped: what SDXL is told of it."""
        left = self.resized[1] - self.target[1] - self.left if self.is_flipped else self.left
        return self.top, left


def place(original: Size, target: Size, *, shift: tuple[float, float] | None = None, flip: bool = False) -> Placement:
    """Resize a picture until it just covers the target, and cut the target out of it.

    For a square target the shorter side gets its length and the longer one is rounded down, as torchvision's `Resize`
    does in the training scripts of diffusers.

    Args:
        original: Size of the picture.
        target: Size of the crop.
        shift: Place of the crop as numbers in [0, 1) downwards and to the right, uniform for a random crop; None: the
            centre.
        flip: Mirror the crop.
    """
    (height, width), (target_height, target_width) = original, target
    if target_height * width >= target_width * height:
        resized = target_height, target_height * width // height
    else:
        resized = target_width * height // width, target_width
    room = resized[0] - target_height, resized[1] - target_width
    if shift is None:
        top, left = round(room[0] / 2), round(room[1] / 2)
    else:
        top, left = int(shift[0] * (room[0] + 1)), int(shift[1] * (room[1] + 1))
    return Placement(original, resized, target, top, left, flip)


def cut(image: Image.Image, placement: Placement) -> Tensor:
    """The pixels of a placement, (3, H, W) float32 in [-1, 1]; resized by Lanczos' filter.

    Args:
        image: RGB, of the placement's original size.
        placement: See `place`.
    """
    height, width = placement.resized
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left, (height, width) = placement.top, placement.left, placement.target
    image = image.crop((left, top, left + width, top + height))
    if placement.is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)
    return pixels.float().div_(127.5).sub_(1)


def make_buckets(resolution: int, step: int) -> tuple[Size, ...]:
    """Shapes of about resolution^2 pixels whose sides are multiples of `step`, from 1:4 to 4:1.

    The other side of each is the multiple that comes nearest to the area; where none comes within a quarter of it,
    the shape is left out. The square is among them where `step` divides the resolution.

    Args:
        resolution: Side of the square.
        step: In pixels.
    """
    area = resolution**2
    shapes: set[Size] = set()
    for long in range(step * math.ceil(resolution / step), 2 * resolution + 1, step):
        short = step * max(1, round(area / long / step))
        if abs(long * short / area - 1) <= _AREA_TOLERANCE:
            shapes |= {(long, short), (short, long)}
    return tuple(sorted(shapes))


def nearest_bucket(original: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose ratio of sides is nearest to a picture's, the larger one of two with the same ratio."""
    ratio = math.log(original[0] / original[1])
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1], size))
