"""From numbers of pictures to pictures with captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from peft_modal.data.drawn.captions import caption_scenes
from peft_modal.data.drawn.concepts import caption_style, caption_subject, paint_style, paint_subject, plan_subject
from peft_modal.data.drawn.scenes import Fixed, Scenes, paint_scenes, plan_scenes
from peft_modal.data.drawn.words import Pairs


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures with captions."""

    images: Tensor
    """(n, 3, S, S) float32 in 0..1."""
    captions: tuple[str, ...]
    """n captions."""
    scenes: Scenes | None
    """What they show; None for the subject, whose pictures are no scenes."""

    def __len__(self) -> int:
        return len(self.captions)


def draw_scenes(
    count: int,
    generator: Generator,
    *,
    side: int = 32,
    pairs: Pairs = "train",
    objects: Literal[1, 2] | None = None,
    colour: Fixed = None,
    shape: Fixed = None,
    pattern: Fixed = None,
    ground: Fixed = None,
) -> Drawn:
    """Captioned scenes; the arguments are those of `plan_scenes`, and `side` in pixels."""
    scenes = plan_scenes(
        count, generator, pairs=pairs, objects=objects, colour=colour, shape=shape, pattern=pattern, ground=ground
    )
    return Drawn(paint_scenes(scenes, side), caption_scenes(scenes, generator), scenes)


def draw_subject(count: int, generator: Generator, *, side: int = 32, name: str = "sks creature") -> Drawn:
    """The subject to fine-tune for: one creature, always of the same looks, in different places.

    Args:
        count: Number of pictures; 48 are enough.
        generator: CPU generator, the only source of randomness.
        side: Pixels.
        name: What captions call it.
    """
    centre, radius, lean, backgrounds = plan_subject(count, generator)
    images = paint_subject(centre, radius, lean, backgrounds, side)
    return Drawn(images, caption_subject(backgrounds, generator, name=name), None)


def draw_style(
    count: int, generator: Generator, *, side: int = 32, pairs: Pairs = "train", prefix: str = "sks style"
) -> Drawn:
    """The style to fine-tune for: scenes as neon signs.

    Args:
        count: Number of pictures; 48 are enough.
        generator: CPU generator, the only source of randomness.
        side: Pixels.
        pairs: Which colours go with which shapes.
        prefix: What captions begin with.
    """
    scenes = plan_scenes(count, generator, pairs=pairs)
    return Drawn(paint_style(scenes, side), caption_style(scenes, generator, prefix=prefix), scenes)
