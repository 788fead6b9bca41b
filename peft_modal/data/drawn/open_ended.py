"""Pictures without captions, for networks that shall be able to show what no caption of this package names.

Any colours, random polygons, blobs and strokes, filled, hollow or rimmed, even or shaded, over textures: an
autoencoder trained on them can show concepts that come later. Held-out pairs are not kept out of these pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

import torch
from torch import Generator, Tensor
from torch.nn import functional

from peft_modal.data.drawn.distances import (
    SHAPE_DISTANCES,
    bands,
    by_kind,
    checks,
    coverage,
    grid,
    integers,
    paint_,
    rotated,
    stripes,
    uniform,
    waves,
    weighted,
)
from peft_modal.data.drawn.scenes import paint_scenes, plan_scenes

_LAYERS: Final = (1.0, 0.75, 0.5, 0.3)
"""Shares of the pictures that have a first, second, ... thing in them."""
_POLYGON_SIDES = 7
_SEGMENTS = 3


def draw_open_ended(count: int, generator: Generator, *, side: int = 32, scene_share: float = 0.3) -> Tensor:
    """Pictures (n, 3, S, S) float32 in 0..1.

    Args:
        count: Number of pictures.
        generator: CPU generator, the only source of randomness.
        side: Pixels.
        scene_share: Share of them that are scenes of training pairs.
    """
    num_scenes = round(count * scene_share)
    images = _paint_grounds(count - num_scenes, side, generator)
    for share in _LAYERS:
        _paint_layer_(images[: round(len(images) * share)], generator)
    scenes = paint_scenes(plan_scenes(num_scenes, generator), side)
    return torch.cat([images, scenes])[torch.randperm(count, generator=generator)]


def random_colours(count: int, generator: Generator) -> Tensor:
    """(n, 3, 1, 1): anything, with pure hues, black and white more often than even chance would have them."""
    colours = uniform(-0.25, 1.25, count, 3, generator=generator).clamp_(0, 1)
    level = uniform(-0.5, 1.5, count, 1, generator=generator).clamp_(0, 1)
    is_grey = torch.rand(count, 1, generator=generator) < 0.15
    return torch.where(is_grey, level, colours)[:, :, None, None]


def _paint_grounds(count: int, side: int, generator: Generator) -> Tensor:
    """Even, shaded, or with a texture of two colours at any angle, or clouded."""
    first, second = random_colours(count, generator), random_colours(count, generator)
    second = torch.lerp(first, second, uniform(0.15, 1, count, 1, 1, 1, generator=generator))
    column = (count, 1, 1)
    x, y = grid(side)
    x, y = rotated(x - side / 2, y - side / 2, uniform(0, torch.pi, *column, generator=generator))
    period = uniform(0.12, 0.5, *column, generator=generator) * side
    shift = uniform(0, side, 2, *column, generator=generator)
    kind = weighted([0.25, 0.15, 0.12, 0.12, 0.12, 0.12, 0.12], count, generator=generator)
    # 0 is even, 1 shaded, 2 clouded, the others textures.
    cover = coverage(by_kind(kind - 3, x + shift[0], y + shift[1], period, (stripes, checks, waves, _dots)))
    shaded, clouded = (kind == 1)[:, None, None], (kind == 2)[:, None, None]
    noise = functional.interpolate(torch.rand(count, 1, 5, 5, generator=generator), side, mode="bilinear")[:, 0]
    cover = torch.where(shaded, (x / side + 0.5).clamp_(0, 1), torch.where(clouded, noise, cover))
    images = first.expand(-1, -1, side, side).clone()
    paint_(images, cover, second)
    return images


def _paint_layer_(images: Tensor, generator: Generator) -> None:
    """Paint one thing over each picture, in place."""
    count, side = len(images), images.shape[-1]
    column = (count, 1, 1)
    x, y = grid(side)
    x = x - uniform(0.1, 0.9, *column, generator=generator) * side
    y = y - uniform(0.1, 0.9, *column, generator=generator) * side
    x, y = rotated(x, y, uniform(-torch.pi, torch.pi, *column, generator=generator))
    stretch = uniform(0.55, 1, *column, generator=generator)
    # Small things are as many as large ones: even in the logarithm.
    radius = uniform(-2.6, -0.9, *column, generator=generator).exp_() * side
    kinds: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
        *SHAPE_DISTANCES,
        lambda u, v, r: _polygon(u, v, r, generator),
        lambda u, v, r: _blob(u, v, r, generator),
        lambda u, v, r: _strokes(u, v, r, generator),
    )
    kind = weighted([*(0.08 for _ in SHAPE_DISTANCES), 0.2, 0.16, 0.16], count, generator=generator)
    distance = by_kind(kind, x / stretch, y, radius, kinds).mul_(stretch)
    # Filled, hollow, or filled with a rim; strokes are always filled, they would be too thin otherwise.
    finish = weighted([0.5, 0.25, 0.25], count, generator=generator).masked_fill_(kind == len(kinds) - 1, 0)
    first, second = random_colours(count, generator), random_colours(count, generator)
    shaded = (torch.rand(count, generator=generator) < 0.25).float()[:, None, None, None]
    along = (0.5 + 0.5 * y / radius).clamp_(0, 1)[:, None]
    paint_(images, coverage(distance) * (finish != 1)[:, None, None], torch.lerp(first, second, along * shaded))
    width = uniform(0.03, 0.09, *column, generator=generator) * side
    rim = coverage(distance.abs() - width / 2) * (finish > 0)[:, None, None]
    paint_(images, rim, random_colours(count, generator))


def _dots(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    across, down = bands(x, period) + period / 4, bands(y, period) + period / 4
    return torch.hypot(across, down) - 0.32 * period


def _polygon(x: Tensor, y: Tensor, r: Tensor, generator: Generator) -> Tensor:
    """Convex, of 3 to 7 sides: the common part of half-planes whose normals go once round."""
    count = len(x)
    sides = integers(_POLYGON_SIDES - 2, count, generator=generator) + 3
    number = torch.arange(_POLYGON_SIDES)
    # Sides beyond the last lie over the first again.
    turn = (number % sides[:, None]) / sides[:, None] * 2 * torch.pi
    turn = turn + uniform(-0.5, 0.5, count, _POLYGON_SIDES, generator=generator).gather(1, number % sides[:, None])
    reach = uniform(0.45, 0.85, count, _POLYGON_SIDES, generator=generator)
    out = torch.full_like(x, -float("inf"))
    for k in range(_POLYGON_SIDES):
        normal = turn[:, k, None, None]
        torch.maximum(out, x * normal.cos() + y * normal.sin() - r * reach[:, k, None, None], out=out)
    return out


def _blob(x: Tensor, y: Tensor, r: Tensor, generator: Generator) -> Tensor:
    """A star or flower of 2 to 7 round points."""
    points = (integers(6, len(x), 1, 1, generator=generator) + 2).float()
    depth = uniform(0.08, 0.4, len(x), 1, 1, generator=generator)
    reach = r * (0.75 + 0.6 * depth * (points * torch.atan2(y, x)).cos_())
    # The slope of the outline makes plain radial distances too long.
    return (torch.hypot(x, y) - reach) / (1 + (0.5 * depth * points) ** 2).sqrt()


def _strokes(x: Tensor, y: Tensor, r: Tensor, generator: Generator) -> Tensor:
    """A line through four random points, 0.025 to 0.07 of the side thick."""
    count, side = len(x), x.shape[-1]
    ends = uniform(-1.6, 1.6, _SEGMENTS + 1, 2, count, 1, 1, generator=generator) * r
    out = torch.full_like(x, float("inf"))
    for start, end in itertools.pairwise(ends):
        along = end - start
        share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / along.square().sum(0).clamp(min=1e-6)
        share.clamp_(0, 1)
        torch.minimum(out, torch.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1]), out=out)
    return out - uniform(0.0125, 0.035, count, 1, 1, generator=generator) * side
