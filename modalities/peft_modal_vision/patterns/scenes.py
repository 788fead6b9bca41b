"""Scenes with a mask: textured grounds, told apart by their texture, and things, told apart by their shape."""

from __future__ import annotations

from typing import Final

import torch
from torch import Generator, Tensor

from peft_modal.data.drawn.distances import by_kind, coverage, grid, integers, paint_, rotated, uniform
from peft_modal_vision.patterns.draw import contrasting, draw_pattern, random_colours, weather_
from peft_modal_vision.patterns.vocabulary import DOWNSTREAM

_GROUNDS: Final = tuple(DOWNSTREAM.textures)
SCENE_CLASSES: Final[tuple[str, ...]] = (*(f"{name} ground" for name in _GROUNDS), *DOWNSTREAM.shapes)
"""Three grounds, then the things."""
_MOST_THINGS: Final = 3


def draw_masked_scenes(count: int, generator: Generator, *, side: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, S, S) float32 in 0..1, and masks (n, S, S) int64 of `SCENE_CLASSES`.

    Each has two grounds with a straight border, and one to three things of any texture in front of them.
    """
    images, mask = _grounds(count, side, generator)
    number = integers(_MOST_THINGS, count, generator=generator) + 1
    for which in range(_MOST_THINGS):
        shape = integers(len(DOWNSTREAM.shapes), count, generator=generator)
        texture = integers(len(DOWNSTREAM.textures), count, generator=generator)
        is_there = which < number
        centre = uniform(0.15, 0.85, 2, count, 1, 1, generator=generator)
        base = images[:, :, side // 2, side // 2, None, None]
        cover = draw_pattern(
            images,
            DOWNSTREAM,
            (torch.where(is_there, shape, -1), torch.where(is_there, texture, -1)),
            centre,
            uniform(0.1, 0.2, count, 1, 1, generator=generator) * side,
            uniform(-0.6, 0.6, count, 1, 1, generator=generator),
            uniform(0.07, 0.1, count, 1, 1, generator=generator) * side,
            uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator),
            contrasting(base, generator),
        )
        mask = torch.where(cover >= 0.5, (shape + len(_GROUNDS))[:, None, None], mask)
    # What a bar hides could not be told.
    weather_(images, generator, bars=False)
    return images, mask


def _grounds(count: int, side: int, generator: Generator) -> tuple[Tensor, Tensor]:
    x, y = grid(side)
    images = torch.zeros(count, 3, side, side)
    mask = torch.zeros(count, side, side, dtype=torch.int64)
    first = integers(len(_GROUNDS), count, generator=generator)
    second = (first + 1 + integers(len(_GROUNDS) - 1, count, generator=generator)) % len(_GROUNDS)
    angle = uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator)
    across, _ = rotated(x - side / 2, y - side / 2, angle)
    beyond = coverage(across - uniform(-0.2, 0.2, count, 1, 1, generator=generator) * side)
    for texture, cover in ((first, torch.ones_like(beyond)), (second, beyond)):
        base = random_colours(count, generator)
        paint_(images, cover, base)
        turn = uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator)
        period = uniform(0.08, 0.13, count, 1, 1, generator=generator) * side
        middle = uniform(0.2, 0.8, 2, count, 1, 1, generator=generator) * side
        u, v = rotated(x - middle[0], y - middle[1], turn)
        pattern = coverage(by_kind(texture, u, v, period, tuple(DOWNSTREAM.textures.values())))
        other = (
            base + uniform(0.15, 0.4, count, 3, 1, 1, generator=generator) * torch.where(base < 0.5, 1.0, -1.0)
        ).clamp(0, 1)
        paint_(images, cover * pattern, other)
        mask = torch.where(cover >= 0.5, texture[:, None, None], mask)
    return images, mask
