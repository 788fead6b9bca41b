"""How things move: places, sizes and turns over the frames of a video.

Places are shares of the frame's sides; every result is (n, T).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from peft_modal.data.drawn.distances import uniform


class Path(NamedTuple):
    """Of n things over T frames, (n, T) each."""

    x: Tensor
    y: Tensor
    zoom: Tensor
    """Factor of the thing's own size."""
    turn: Tensor
    """In radians."""


def curves(count: int, frames: int, generator: Generator) -> Path:
    """Sums of two slow oscillations that begin well inside; things swell, shrink and swing."""
    time = torch.arange(frames) / 40.0  # an oscillation takes as many frames in a longer video
    x, y = (_wave(count, time, 0.3, 0.12, generator) for _ in range(2))
    start = uniform(0.3, 0.7, 2, count, 1, generator=generator)
    zoom = torch.exp(_wave(count, time, 0.25, 0.1, generator))
    turn = _wave(count, time, 1.2, 0.3, generator) + uniform(-math.pi, math.pi, count, 1, generator=generator)
    return Path(start[0] + x - x[:, :1], start[1] + y - y[:, :1], zoom, turn)


def lines(count: int, frames: int, generator: Generator) -> Path:
    """Straight ways at an even pace that bounce off the borders; things spin evenly and grow or shrink once."""
    time = torch.arange(frames, dtype=torch.float32)
    place = []
    for _ in range(2):
        pace = uniform(0.005, 0.03, count, 1, generator=generator)
        forth = torch.where(torch.rand(count, 1, generator=generator) < 0.5, -1.0, 1.0)
        there = uniform(0.3, 0.7, count, 1, generator=generator) + forth * pace * time
        place.append(0.1 + 0.8 * (1 - ((there - 0.1) / 0.8).remainder(2).sub(1).abs()))
    zoom = torch.exp(uniform(-0.4, 0.4, count, 1, generator=generator) * time / frames)
    spin = uniform(-0.06, 0.06, count, 1, generator=generator)
    return Path(place[0], place[1], zoom, spin * time + uniform(-math.pi, math.pi, count, 1, generator=generator))


def leave(path: Path, chosen: Tensor, generator: Generator) -> Path:
    """Send the `chosen` (n,) bool out of the frame on their nearer side and back, some time in the second half."""
    count, frames = path.x.shape
    time = torch.arange(frames) / max(1, frames - 1)
    middle = uniform(0.55, 0.8, count, 1, generator=generator)
    away = torch.exp(-(((time - middle) / 0.08) ** 2))  # (n, T)
    at = (middle[:, 0] * (frames - 1)).long()
    beyond = torch.where(path.x[torch.arange(count), at] < 0.5, -0.35, 1.35)[:, None]
    away = away * chosen[:, None]
    return path._replace(x=path.x * (1 - away) + beyond * away)


def across(path: Path, generator: Generator) -> Path:
    """Things that each cross the way of another once, in the second third of the video: what hides it."""
    count, frames = path.x.shape
    time = torch.arange(frames) / max(1, frames - 1)
    meet = uniform(0.35, 0.65, count, 1, generator=generator)
    angle = uniform(-math.pi, math.pi, count, 1, generator=generator)
    apart = (time - meet) * uniform(2.0, 3.5, count, 1, generator=generator)
    turn = uniform(-2, 2, count, 1, generator=generator) * time
    return Path(path.x + apart * angle.cos(), path.y + apart * angle.sin(), torch.ones_like(turn), turn)


def _wave(count: int, time: Tensor, slow: float, fast: float, generator: Generator) -> Tensor:
    """(n, T), a slow and a fast oscillation with these amplitudes at most."""
    total = torch.zeros(count, len(time))
    for most, low, high in ((slow, 0.4, 0.9), (fast, 1.0, 2.0)):
        size = uniform(0.4 * most, most, count, 1, generator=generator)
        frequency = uniform(low, high, count, 1, generator=generator)
        phase = uniform(-math.pi, math.pi, count, 1, generator=generator)
        total = total + size * torch.sin(2 * math.pi * frequency * time + phase)
    return total
