"""Signed distances of more plane shapes; see `peft_modal.data.drawn.distances` for coordinates and painting."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from peft_modal.data.drawn.distances import box, circle, rotated, square


def folded(x: Tensor, y: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Coordinates in one half of one of `parts` equal sectors, the first of which points up: along and across it."""
    sector = 2 * math.pi / parts
    angle = torch.atan2(x, -y).remainder(sector)
    angle = torch.minimum(angle, sector - angle)
    reach = torch.hypot(x, y)
    return reach * angle.cos(), reach * angle.sin()


def star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five spikes of length 1.15 r, notches at 0.5 r."""
    along, across = folded(x, y, 5)
    tip, notch_along, notch_across = 1.15 * r, 0.5 * r * math.cos(math.pi / 5), 0.5 * r * math.sin(math.pi / 5)
    edge_along, edge_across = notch_along - tip, notch_across
    length = torch.hypot(edge_along, edge_across)
    return ((along - tip) * edge_across - across * edge_along) / length


def hexagon(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Six sides, corners at r."""
    along, across = folded(x, y, 6)
    return along * math.cos(math.pi / 6) + across * math.sin(math.pi / 6) - r * math.cos(math.pi / 6)


def crescent(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A disc with a disc cut out of its right side."""
    return torch.maximum(circle(x, y, r), -circle(x - 0.55 * r, y, 0.8 * r))


def arrow(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Pointing up: a head over a shaft."""
    head = torch.maximum(x.abs() * 0.77 + (y + r) * -0.64, y)
    return torch.minimum(head, box(x, y - 0.45 * r, 0.28 * r, 0.6 * r))


def capsule(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A rod with round ends, 2.2 r long."""
    return torch.hypot(x, (y.abs() - 0.75 * r).clamp(min=0)) - 0.38 * r


def heart(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Two lobes above a point."""
    side = x.abs()
    lobes = circle(side - 0.45 * r, y + 0.35 * r, 0.55 * r)
    point = torch.maximum((side + y) * 0.707 - 0.46 * r, -(y + 0.35 * r))
    return torch.minimum(lobes, point)


def gear(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A wheel with eight teeth and a hole."""
    along, across = folded(x, y, 8)
    teeth = torch.maximum(across - 0.17 * r, along - 1.1 * r)
    return torch.maximum(torch.minimum(circle(x, y, 0.8 * r), teeth), -circle(x, y, 0.32 * r))


def dome(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """The upper half of a disc."""
    return torch.maximum(circle(x, y - 0.4 * r, 1.1 * r), y - 0.4 * r)


def tee(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A bar on a post."""
    return torch.minimum(box(x, y + 0.65 * r, r, 0.32 * r), box(x, y - 0.15 * r, 0.32 * r, 0.9 * r))


def ell(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A post with a foot to the right."""
    return torch.minimum(box(x + 0.5 * r, y, 0.32 * r, r), box(x, y - 0.7 * r, 0.8 * r, 0.32 * r))


def hourglass(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Two triangles, point to point."""
    return torch.maximum(x.abs() * 0.77 - y.abs() * 0.64 - 0.1 * r, y.abs() - 0.95 * r)


def frame(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A square with a square hole."""
    return torch.maximum(square(x, y, 1.1 * r), -square(x, y, 0.55 * r))


def pie(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A disc without a sixth, the gap to the right."""
    return torch.maximum(circle(x, y, 1.05 * r), x * 0.5 - y.abs() * 0.87)


def bolt(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Three strokes, down and up again."""
    parts = []
    for middle, angle, half in ((-0.55, 0.5, 0.65), (0.0, -0.9, 0.5), (0.55, 0.5, 0.65)):
        u, v = rotated(x, y - middle * r, torch.tensor(angle))
        parts.append(box(u, v, 0.26 * r, half * r))
    return reduce(torch.minimum, parts)
