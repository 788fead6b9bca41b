"""Captioned pictures: one or two objects on a background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from peft_modal.data.drawn.distances import (
    SHAPE_DISTANCES,
    by_kind,
    checks,
    coverage,
    grid,
    integers,
    paint_,
    stripes,
    uniform,
    waves,
)
from peft_modal.data.drawn.words import COLOURS, GROUNDS, PATTERNS, PLACES, RELATIONS, SHAPES, SIZES, Pairs, pair_mask
from peft_modal.errors import ConfigError

Fixed = int | Tensor | None
"""A number for all pictures, one for each (n,) int64, or None: drawn at random."""
_PERIODS = (0.23, 0.27)
_RADII = {1: ((0.16, 0.19), (0.25, 0.29)), 2: ((0.14, 0.165), (0.19, 0.215))}
_SHADE = 0.04


@dataclass(frozen=True, eq=False)
class Backgrounds:
    """Backgrounds of n pictures."""

    pattern: Tensor
    """(n,) int64, places in PATTERNS."""
    ground: Tensor
    """(n,) int64, places in GROUNDS."""
    period: Tensor
    """(n,) share of the picture's side after which the pattern comes again."""
    shift: Tensor
    """(n, 2) how far the pattern is moved, as a share of the side."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """What n pictures show. All that is random is in here: a scene can be painted at any side, in any style."""

    colour: Tensor
    """(n, 2) int64, places in COLOURS; -1 where there is no second object, here and below."""
    shape: Tensor
    """(n, 2) int64, places in SHAPES."""
    size: Tensor
    """(n, 2) int64, places in SIZES."""
    centre: Tensor
    """(n, 2, 2) x to the right and y down, as shares of the side."""
    radius: Tensor
    """(n, 2) as a share of the side, 0 where there is no second object."""
    rgb: Tensor
    """(n, 2, 3) the colour as painted, a little off the named one."""
    place: Tensor
    """(n,) int64, places in PLACES; -1 for two objects."""
    relation: Tensor
    """(n,) int64, places in RELATIONS; -1 for one object."""
    backgrounds: Backgrounds

    def __len__(self) -> int:
        return len(self.colour)


def plan_backgrounds(count: int, generator: Generator, *, pattern: Fixed = None, ground: Fixed = None) -> Backgrounds:
    """Choose backgrounds at random, or with a given pattern or ground."""
    return Backgrounds(
        pattern=_chosen(pattern, integers(len(PATTERNS), count, generator=generator), len(PATTERNS), "pattern"),
        ground=_chosen(ground, integers(len(GROUNDS), count, generator=generator), len(GROUNDS), "ground"),
        period=uniform(*_PERIODS, count, generator=generator),
        shift=uniform(0, 1, count, 2, generator=generator),
    )


def plan_scenes(
    count: int,
    generator: Generator,
    *,
    pairs: Pairs = "train",
    objects: Literal[1, 2] | None = None,
    colour: Fixed = None,
    shape: Fixed = None,
    pattern: Fixed = None,
    ground: Fixed = None,
) -> Scenes:
    """Choose what to draw.

    Args:
        count: Number of pictures.
        generator: CPU generator, the only source of randomness.
        pairs: Which colours go with which shapes, for both objects.
        objects: Objects per picture; None for one or two, equally often.
        colour: Of the first object.
        shape: Of the first object; with `colour` it may be any pair, whatever `pairs` says.
        pattern: Of the background.
        ground: Of the background.

    Raises:
        ConfigError: A fixed number is out of range, or `pairs` is unknown.
    """
    if pairs not in {"train", "held_out", "all"}:
        raise ConfigError(f"pairs is '{pairs}', expected 'train', 'held_out' or 'all'.")
    allowed = pair_mask(pairs).float().expand(count, -1, -1).clone()
    given = torch.full((count,), -1)
    first_colour = _chosen(colour, given, len(COLOURS), "colour")
    first_shape = _chosen(shape, given, len(SHAPES), "shape")
    first = allowed.clone()
    if colour is not None and shape is not None:
        first.fill_(1)
    if colour is not None:
        first *= torch.nn.functional.one_hot(first_colour, len(COLOURS))[:, :, None]
    if shape is not None:
        first *= torch.nn.functional.one_hot(first_shape, len(SHAPES))[:, None]
    pair_1 = torch.multinomial(first.flatten(1), 1, generator=generator)
    others = allowed.flatten(1).scatter_(1, pair_1, 0)  # two equal objects could not be told apart in a caption
    pair_2 = torch.multinomial(others, 1, generator=generator)
    pair = torch.cat([pair_1, pair_2], dim=1)

    two = integers(2, count, generator=generator) == 1 if objects is None else torch.full((count,), objects == 2)
    absent = torch.stack([torch.zeros_like(two), ~two], dim=1)
    size = integers(len(SIZES), count, 2, generator=generator)
    radius = _radii(size, two, generator)
    place = integers(len(PLACES), count, generator=generator)
    relation = integers(len(RELATIONS), count, generator=generator)
    centre = torch.where(
        two[:, None, None], _centres_of_two(relation, generator), _centres_of_one(place, radius[:, 0], generator)
    )
    named = torch.tensor(list(COLOURS.values()))[pair // len(SHAPES)]
    rgb = (named + uniform(-_SHADE, _SHADE, count, 2, 3, generator=generator)).clamp_(0, 1)
    return Scenes(
        colour=(pair // len(SHAPES)).masked_fill(absent, -1),
        shape=(pair % len(SHAPES)).masked_fill(absent, -1),
        size=size.masked_fill(absent, -1),
        centre=centre,
        radius=radius.masked_fill(absent, 0),
        rgb=rgb,
        place=place.masked_fill(two, -1),
        relation=relation.masked_fill(~two, -1),
        backgrounds=plan_backgrounds(count, generator, pattern=pattern, ground=ground),
    )


def paint_backgrounds(backgrounds: Backgrounds, side: int) -> Tensor:
    """Pictures of nothing but the background, (n, 3, S, S)."""
    x, y = grid(side)
    period = (backgrounds.period * side)[:, None, None]
    shift = backgrounds.shift * side
    x, y = x + shift[:, 0, None, None], y + shift[:, 1, None, None]
    # Number 0 is plain: nothing is painted over it.
    distance = by_kind(backgrounds.pattern - 1, x, y, period, (stripes, checks, waves))
    tones = torch.tensor(list(GROUNDS.values()))[backgrounds.ground][..., None, None]
    images = tones[:, 0].expand(-1, -1, side, side).clone()
    paint_(images, coverage(distance), tones[:, 1])
    return images


def object_distance(scenes: Scenes, which: int, side: int) -> Tensor:
    """Signed distance (n, S, S) in pixels of the first (0) or second (1) object; infinite where it is absent."""
    x, y = grid(side)
    centre = (scenes.centre[:, which] * side)[:, :, None, None]
    radius = (scenes.radius[:, which] * side)[:, None, None]
    return by_kind(scenes.shape[:, which], x - centre[:, 0], y - centre[:, 1], radius, SHAPE_DISTANCES)


def paint_scenes(scenes: Scenes, side: int) -> Tensor:
    """The pictures, (n, 3, S, S) float32 in 0..1."""
    images = paint_backgrounds(scenes.backgrounds, side)
    for which in (0, 1):
        paint_(images, coverage(object_distance(scenes, which, side)), scenes.rgb[:, which, :, None, None])
    return images


def _chosen(fixed: Fixed, drawn: Tensor, limit: int, name: str) -> Tensor:
    if fixed is None:
        return drawn
    chosen = torch.as_tensor(fixed).expand_as(drawn)
    if ((chosen < 0) | (chosen >= limit)).any():
        raise ConfigError(f"{name} is {fixed}, expected numbers from 0 to {limit - 1}.")
    return chosen


def _radii(size: Tensor, two: Tensor, generator: Generator) -> Tensor:
    low, high = torch.tensor([_RADII[1], _RADII[2]])[two.long()[:, None], size].unbind(-1)
    return low + (high - low) * torch.rand(size.shape, generator=generator)


def _centres_of_one(place: Tensor, radius: Tensor, generator: Generator) -> Tensor:
    """(n, 2, 2), both the same: off the middle as far as the object stays in the picture, along one axis only."""
    directions = torch.tensor([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])[place]
    offset = (0.47 - radius).clamp_(max=0.28)[:, None] * directions
    return (0.5 + offset + uniform(-0.03, 0.03, len(place), 2, generator=generator))[:, None].expand(-1, 2, -1)


def _centres_of_two(relation: Tensor, generator: Generator) -> Tensor:
    """(n, 2, 2), on both sides of the middle along one axis, up to a tenth of the side apart along the other."""
    directions = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])[relation]
    along = 0.25 * directions[:, None] * torch.tensor([1, -1])[None, :, None]
    across = uniform(-0.05, 0.05, len(relation), 2, 2, generator=generator) * directions.flip(-1)[:, None].abs()
    return 0.5 + along + across
