"""Textures of two colours: signed distances to a pattern that goes on everywhere, `period` pixels apart."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_modal.data.drawn.distances import bands, checks, stripes, waves

__all__ = ("bricks", "checks", "dots", "mesh", "plain", "rays", "rings", "scales", "stripes", "waves", "zigzag")


def plain(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Nothing of the second colour."""
    del y, period
    return torch.full_like(x, 2.0)


def dots(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Discs on a square grid."""
    across, down = (_triangle(axis, period) for axis in (x, y))
    return torch.hypot(across, down) - 0.3 * period


def rings(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Circles around the middle."""
    return bands(torch.hypot(x, y), period)


def mesh(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Thin lines along both axes."""
    return torch.minimum(_triangle(x, period), _triangle(y, period)) - 0.13 * period


def scales(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Diamonds, point to point."""
    return (_triangle(x, period) + _triangle(y, period)) * 0.707 - 0.35 * period


def zigzag(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Level bands that go up and down in straight lines."""
    return bands(y + _triangle(x, 1.4 * period) - 0.35 * period, period) * 0.8


def bricks(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Lines between bricks, each row moved by half of one."""
    row = (y / (0.8 * period)).floor()
    moved = x + (row.remainder(2) * 0.8) * period
    return torch.minimum(_triangle(moved, 1.6 * period), _triangle(y, 0.8 * period)) - 0.12 * period


def rays(x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Sectors around the middle, as many as make them `period` wide eight pixels out."""
    count = (2 * torch.pi * 8 / period).round().clamp(min=4)
    turn = torch.atan2(y, x) / (2 * torch.pi) * count
    return ((turn.remainder(1) - 0.5).abs() - 0.25) * torch.hypot(x, y) * 2 * torch.pi / count


def _triangle(u: Tensor, period: Tensor) -> Tensor:
    """Distance to the nearest multiple of a period."""
    return ((u / period + 0.5).remainder(1) - 0.5).abs() * period
