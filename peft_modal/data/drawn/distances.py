"""Signed distances of plane shapes in pixels, negative inside, and painting with them.

Coordinates are (n, S, S) tensors relative to the shape's centre, x to the right and y down; sizes are (n, 1, 1).
Every picture is painted by covering a pixel as far as the shape reaches over it: `0.5 - distance`, cut to 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def grid(side: int) -> tuple[Tensor, Tensor]:
    """Where the pixels are: x and y of their middles, (S, S) each, in pixels."""
    axis = torch.arange(side, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def rotated(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame that is turned by an angle in radians."""
    cos, sin = angle.cos(), angle.sin()
    return x * cos + y * sin, y * cos - x * sin


def coverage(distance: Tensor) -> Tensor:
    """How much of each pixel lies inside, 0..1."""
    return (0.5 - distance).clamp_(0, 1)


def paint_(images: Tensor, cover: Tensor, colour: Tensor) -> None:
    """Paint over (n, 3, S, S) in place.

    Args:
        images: The pictures.
        cover: (n, S, S), 0..1.
        colour: (n, 3, 1, 1), or (n, 3, S, S) for a fill that is not even.
    """
    torch.lerp(images, colour.expand_as(images), cover[:, None], out=images)


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Radius r."""
    return torch.hypot(x, y) - r


def box(x: Tensor, y: Tensor, half_x: Tensor, half_y: Tensor) -> Tensor:
    """Rectangle; at its corners the distance is that of the nearer edge."""
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Sides of 1.7 r: about the area of the circle."""
    return box(x, y, 0.85 * r, 0.85 * r)


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Point up, 2 r wide and 1.8 r high."""
    slope = torch.tensor(1.8).atan()  # of the steep sides: 1.8 r over half the width
    sides = x.abs() * slope.sin() - y * slope.cos() - r * slope.cos()
    return torch.maximum(sides, y - 0.8 * r)


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Two upright bars, 0.7 r thick."""
    return torch.minimum(box(x, y, r, 0.35 * r), box(x, y, 0.35 * r, r))


def diamond(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Rhombus, 1.6 r wide and 2.2 r high: not to be taken for a turned square."""
    return (x.abs() * 1.1 + y.abs() * 0.8 - 0.88 * r) / (1.1**2 + 0.8**2) ** 0.5


def ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Between the radii 0.55 r and 1.05 r."""
    return (torch.hypot(x, y) - 0.8 * r).abs() - 0.25 * r


SHAPE_DISTANCES: Final[tuple[Distance, ...]] = (circle, square, triangle, cross, diamond, ring)
"""In the order of `SHAPES`."""


def by_kind(kind: Tensor, x: Tensor, y: Tensor, r: Tensor, distances: Sequence[Distance]) -> Tensor:
    """Distance (n, S, S) where each of the n has a kind of its own; -1 is nothing at all."""
    out = torch.full_like(x, float("inf"))
    for number, distance in enumerate(distances):
        chosen = (kind == number).nonzero()[:, 0]
        if len(chosen):
            out[chosen] = distance(x[chosen], y[chosen], r[chosen])
    return out


def bands(u: Tensor, period: Tensor) -> Tensor:
    """Parallel bands across u, half a period thick."""
    return ((u / period).remainder_(1) - 0.5).abs_().mul_(period).sub_(period / 4)


def stripes(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Upright bands."""
    del y
    return bands(x, period)


def checks(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """A chessboard."""
    across, down = bands(x, period), bands(y, period)
    return torch.maximum(torch.minimum(across, down), -torch.maximum(across, down))


def waves(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Level bands that go up and down."""
    return bands(y + 0.3 * period * (x * (torch.pi / period)).sin_(), period)


def uniform(low: float, high: float, *shape: int, generator: torch.Generator) -> Tensor:
    """Even random numbers."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def integers(limit: int, *shape: int, generator: torch.Generator) -> Tensor:
    """Even random integers below a limit, int64."""
    return torch.randint(limit, shape, generator=generator)


def weighted(weights: Sequence[float], count: int, *, generator: torch.Generator) -> Tensor:
    """Numbers of choices, (count,) int64, each as often as its weight says."""
    # `multinomial` refuses to draw none.
    return torch.multinomial(torch.tensor(weights), max(count, 1), replacement=True, generator=generator)[:count]
