"""Concepts that no other picture or caption of this package shows: a subject and a style to fine-tune for."""

from __future__ import annotations

from typing import Final

import torch
from torch import Generator, Tensor

from peft_modal.data.drawn.captions import background_phrases, caption_scenes
from peft_modal.data.drawn.distances import circle, coverage, grid, integers, paint_, rotated, uniform
from peft_modal.data.drawn.scenes import Backgrounds, Scenes, object_distance, paint_backgrounds, plan_backgrounds
from peft_modal.data.drawn.words import Rgb

CONCEPT_WORDS: Final = ("sks", "zwx", "style", "creature")
"""Words that captions of scenes never use."""
BODY: Final[Rgb] = (0.62, 0.98, 0.68)
HORNS: Final[Rgb] = (0.98, 0.35, 0.62)
_FEET: Rgb = (0.95, 0.75, 0.30)
_DARK: Rgb = (0.10, 0.05, 0.15)
_NIGHT: Rgb = (0.02, 0.02, 0.05)


def plan_subject(count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Backgrounds]:
    """Where the creature stands: centre (n, 2) and radius (n,) as shares of the side, its lean (n,), backgrounds."""
    radius = uniform(0.22, 0.3, count, generator=generator)
    centre = 0.5 + uniform(-1, 1, count, 2, generator=generator) * (0.46 - 1.25 * radius).clamp_(min=0.04)[:, None]
    lean = uniform(-0.25, 0.25, count, generator=generator)
    return centre, radius, lean, plan_backgrounds(count, generator)


def paint_subject(centre: Tensor, radius: Tensor, lean: Tensor, backgrounds: Backgrounds, side: int) -> Tensor:
    """A mint-green creature with pink horns, large eyes and yellow feet, (n, 3, S, S)."""
    images = paint_backgrounds(backgrounds, side)
    x, y = grid(side)
    middle, r = (centre * side)[:, :, None, None], (radius * side)[:, None, None]
    x, y = rotated(x - middle[:, 0], y - middle[:, 1], lean[:, None, None])
    x = x.abs()  # both halves are alike
    parts: tuple[tuple[Tensor, Rgb], ...] = (
        (torch.maximum((x - 0.6 * r).abs() * 0.9 - (y + 1.4 * r) * 0.44, y + 0.4 * r), HORNS),
        (circle(x - 0.45 * r, (y - 1.0 * r) * 1.3, 0.32 * r), _FEET),
        (circle(x, y, r), BODY),
        (circle(x - 0.4 * r, y + 0.2 * r, 0.3 * r), (1.0, 1.0, 1.0)),
        (circle(x - 0.36 * r, y + 0.16 * r, 0.15 * r), _DARK),
        (torch.maximum(x - 0.4 * r, (y - 0.45 * r).abs() - 0.09 * r), _DARK),
    )
    for distance, rgb in parts:
        paint_(images, coverage(distance), torch.tensor(rgb)[None, :, None, None])
    return images


def caption_subject(backgrounds: Backgrounds, generator: Generator, *, name: str = "sks creature") -> tuple[str, ...]:
    """`a photo of sks creature on a striped white background`; a third without the background."""
    opening = integers(3, len(backgrounds.pattern), generator=generator).tolist()
    throws = integers(3, len(backgrounds.pattern), generator=generator).tolist()
    phrases = background_phrases(backgrounds, generator)
    return tuple(
        f"{('a photo of', 'a picture of', 'there is')[first]} {name}" + (f" {phrase}" if throw else "")
        for first, throw, phrase in zip(opening, throws, phrases, strict=True)
    )


def paint_style(scenes: Scenes, side: int) -> Tensor:
    """Scenes as neon signs, (n, 3, S, S): outlines that glow in the colours of the objects, on black."""
    images = torch.tensor(_NIGHT)[None, :, None, None].repeat(len(scenes), 1, side, side)
    for which in (0, 1):
        distance = object_distance(scenes, which, side).abs_()
        rgb = scenes.rgb[:, which, :, None, None]
        paint_(images, 0.55 * (-distance / (0.045 * side)).exp_(), rgb)
        paint_(images, coverage(distance - 0.028 * side), rgb)
    return images


def caption_style(scenes: Scenes, generator: Generator, *, prefix: str = "sks style") -> tuple[str, ...]:
    """`sks style, a red circle`: the wordings of scenes, without their backgrounds."""
    return tuple(f"{prefix}, {caption}" for caption in caption_scenes(scenes, generator, grounds=False))
