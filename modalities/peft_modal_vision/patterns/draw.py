"""Pictures of one textured shape each."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from peft_modal.data.drawn.distances import by_kind, coverage, grid, integers, paint_, rotated, stripes, uniform, waves
from peft_modal_vision.patterns.vocabulary import Vocabulary


def draw_patterns(vocabulary: Vocabulary, labels: Tensor, generator: Generator, *, side: int = 32) -> Tensor:
    """Pictures (n, 3, S, S) float32 in 0..1 of the classes `labels` (n,).

    A shape of any place, size, lean and colours over a ground of two colours that are near each other. The texture has
    a direction of its own. Weathered pictures are lit from one side, have a bar in front, and noise.
    """
    count = len(labels)
    num_textures = len(vocabulary.textures)
    kind, texture = labels // num_textures, labels % num_textures
    base = random_colours(count, generator)
    images = _grounds(base, side, generator)
    centre = 0.5 + uniform(-0.14, 0.14, 2, count, 1, 1, generator=generator)
    radius = uniform(0.24, 0.38, count, 1, 1, generator=generator) * side
    lean = uniform(-0.6, 0.6, count, 1, 1, generator=generator)
    period = uniform(0.13, 0.2, count, 1, 1, generator=generator) * side
    turn = uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator)
    colours = contrasting(base, generator)
    draw_pattern(images, vocabulary, (kind, texture), centre, radius, lean, period, turn, colours)
    if vocabulary.is_weathered:
        weather_(images, generator)
    return images


def draw_pattern(
    images: Tensor,
    vocabulary: Vocabulary,
    what: tuple[Tensor, Tensor],
    centre: Tensor,
    radius: Tensor,
    lean: Tensor,
    period: Tensor,
    turn: Tensor,
    colours: tuple[Tensor, Tensor],
) -> Tensor:
    """Paint one textured shape over each picture, in place; gives its coverage (n, S, S).

    Args:
        images: (n, 3, S, S).
        vocabulary: The names behind the numbers.
        what: Shape and texture of each (n,); -1 is none.
        centre: (2, n, 1, 1), as shares of the side.
        radius: (n, 1, 1), in pixels.
        lean: Of the shape, in radians (n, 1, 1).
        period: Of the texture, in pixels (n, 1, 1).
        turn: Of the texture, in radians (n, 1, 1).
        colours: First and second colour (n, 3, 1, 1).
    """
    side = images.shape[-1]
    x, y = grid(side)
    x, y = x - centre[0] * side, y - centre[1] * side
    cover = coverage(by_kind(what[0], *rotated(x, y, lean), radius, tuple(vocabulary.shapes.values())))
    paint_(images, cover, colours[0])
    pattern = by_kind(what[1], *rotated(x, y, turn), period, tuple(vocabulary.textures.values()))
    paint_(images, cover * coverage(pattern), colours[1])
    return cover


def random_colours(count: int, generator: Generator) -> Tensor:
    """Any colours (n, 3, 1, 1)."""
    return uniform(-0.1, 1.1, count, 3, 1, 1, generator=generator).clamp_(0, 1)


def contrasting(base: Tensor, generator: Generator, *, candidates: int = 6) -> tuple[Tensor, Tensor]:
    """Two colours (n, 3, 1, 1) far from a third and from each other: the best of a few draws each."""
    count = len(base)
    drawn = uniform(0, 1, 2, candidates, count, 3, 1, 1, generator=generator)
    first = _farthest(drawn[0], (base,))
    return first, _farthest(drawn[1], (first, 0.5 * (first + base)))


def _farthest(candidates: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """The candidate (c, n, 3, 1, 1) whose least distance to the others is largest, (n, 3, 1, 1)."""
    apart = torch.stack([(candidates - other).square().sum(2) for other in others]).amin(0)
    best = apart.argmax(0).view(1, -1, 1, 1, 1).expand(1, *candidates.shape[1:])
    return candidates.gather(0, best)[0]


def _grounds(base: Tensor, side: int, generator: Generator) -> Tensor:
    """Even, shaded, clouded, or with a faint pattern."""
    count = len(base)
    other = (base + uniform(-0.22, 0.22, count, 3, 1, 1, generator=generator)).clamp_(0, 1)
    x, y = grid(side)
    x, y = rotated(x - side / 2, y - side / 2, uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator))
    kind = integers(5, count, generator=generator)
    period = uniform(0.2, 0.5, count, 1, 1, generator=generator) * side
    clouds = functional.interpolate(torch.rand(count, 1, 6, 6, generator=generator), side, mode="bilinear")[:, 0]
    cover = coverage(by_kind(kind - 3, x, y, period, (stripes, waves)))
    for number, values in ((1, (x / side + 0.5).clamp(0, 1)), (2, clouds)):
        cover = torch.where((kind == number)[:, None, None], values, cover)
    images = base.repeat(1, 1, side, side)
    paint_(images, cover, other)
    return images


def weather_(images: Tensor, generator: Generator, *, bars: bool = True) -> None:
    """Light from one side, with `bars` one in front of half of them, and noise; in place."""
    count, side = len(images), images.shape[-1]
    x, y = grid(side)
    angle = uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator)
    u, v = rotated(x - side / 2, y - side / 2, angle)
    images *= (1 + uniform(0.2, 0.8, count, 1, 1, generator=generator) * u / side)[:, None]
    if bars:
        _bars_(images, v, generator)
    images += 0.06 * torch.randn(images.shape, generator=generator)
    images.clamp_(0, 1)


def _bars_(images: Tensor, v: Tensor, generator: Generator) -> None:
    """Bars along v = 0, in place."""
    count, side = len(images), images.shape[-1]
    offset = uniform(-0.3, 0.3, count, 1, 1, generator=generator) * side
    width = uniform(0.03, 0.07, count, 1, 1, generator=generator) * side
    is_there = torch.rand(count, 1, 1, generator=generator) < 0.5
    paint_(images, coverage((v - offset).abs() - width) * is_there, random_colours(count, generator))
