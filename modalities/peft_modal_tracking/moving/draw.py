"""Sprites and grounds of the vision modality's vocabularies, warped along paths, with true boxes and visible shares."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

from peft_modal.data.drawn.distances import by_kind, coverage, grid, integers, paint_, rotated, uniform
from peft_modal_tracking.boxes import Size
from peft_modal_tracking.moving.paths import Path, across, curves, leave, lines
from peft_modal_vision.patterns import DOWNSTREAM, Vocabulary
from peft_modal_vision.patterns.draw import contrasting, draw_pattern, random_colours

GENERATOR_VERSION: Final = 1
"""Of the generated videos; to be raised with every change that alters one."""
_SPRITE: Final = 48
"""Side of a sprite in pixels; its shape fills most of it."""
_GROUND: Final = 160
_CHUNK: Final = 4
"""Videos that are rendered at once; bounds the memory."""
_SEEN: Final = 0.05
"""Visible share from which on a target counts as present."""


class Sprites(NamedTuple):
    """n things, colours times coverage (n, 3, S, S) and coverage (n, 1, S, S)."""

    colour: Tensor
    cover: Tensor


def draw_videos(
    count: int, frames: int, size: Size, vocabulary: Vocabulary, generator: Generator, *, every: int = 1
) -> dict[str, Tensor]:
    """Videos of one target each, among others, over a ground that moves.

    Behind the target go another of its kind in other colours and one more thing; in half of the videos something
    crosses in front of it. In every fourth the target leaves the frame for a while, in every eighth it is tiny.

    Args:
        count: Videos.
        frames: Of each.
        size: Of the frames.
        vocabulary: Shapes and textures; things of `DOWNSTREAM` move in curves, others straight on.
        generator: Of everything.
        every: Show only one in so many moments of a video that is as many times longer.

    Returns:
        `frames` (n, T, 3, H, W) uint8, `boxes` x, y, w, h (n, T, 4) float32 (zeros where nothing of the target is
        inside the frame), `share` of the target that is to be seen (n, T) float32.
    """
    move = curves if vocabulary is DOWNSTREAM else lines
    numbers = torch.arange(count)
    base = random_colours(count, generator)
    grounds = _grounds(base, vocabulary, generator)
    kinds = [integers(len(names), count, generator=generator) for names in (vocabulary.shapes, vocabulary.textures)]
    others = [integers(len(names), 2, count, generator=generator) for names in (vocabulary.shapes, vocabulary.textures)]
    # Another of its kind and one more thing, the target, what goes in front of it.
    what = [kinds, [names[0] for names in others], kinds, [names[1] for names in others]]
    sprites = [_sprites(vocabulary, kind, base, generator) for kind in what]
    radius = uniform(0.09, 0.14, count, 1, generator=generator)
    radius = torch.where((numbers % 8 == 5)[:, None], 0.035, radius) * min(size)
    moments = frames * every
    target = leave(move(count, moments, generator), numbers % 4 == 3, generator)
    crossing = across(target, generator)
    crossing = crossing._replace(zoom=crossing.zoom * 1.3 * ((numbers % 2 == 0)[:, None]))
    paths = [move(count, moments, generator), move(count, moments, generator), target, crossing]
    pan = move(count, moments, generator)
    *paths, pan = (Path(*(part[:, ::every] for part in path)) for path in (*paths, pan))
    parts = []
    for start in range(0, count, _CHUNK):
        some = slice(start, start + _CHUNK)
        layers = [
            (Sprites(sprite.colour[some], sprite.cover[some]), Path(*(part[some] for part in path)), radius[some])
            for sprite, path in zip(sprites, paths, strict=True)
        ]
        parts.append(_render(grounds[some], Path(*(part[some] for part in pan)), layers, size, generator))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _render(
    grounds: Tensor, pan: Path, layers: list[tuple[Sprites, Path, Tensor]], size: Size, generator: Generator
) -> dict[str, Tensor]:
    count, frames = pan.x.shape
    images = _ground_views(grounds, pan, size)  # (n * T, 3, H, W)
    *behind, target, front = layers
    for layer in behind:
        colour, cover = _warped(*layer, size)
        images = images * (1 - cover) + colour
    colour, own = _warped(*target, size)
    images = images * (1 - own) + colour
    colour, cover = _warped(*front, size)
    images = images * (1 - cover) + colour
    images += 0.02 * torch.randn(images.shape, generator=generator)
    sprite, path, radius = target
    # As much as there would be of it in a frame without borders and without anything in front.
    scale = path.zoom * radius / _REACH  # pixels of the frame per pixel of the sprite
    whole = sprite.cover.sum((1, 2, 3))[:, None] * scale**2
    share = (own * (1 - cover)).sum((1, 2, 3)).view(count, frames) / whole
    return {
        "frames": (images.clamp(0, 1) * 255).round().to(torch.uint8).view(count, frames, 3, *size),
        "boxes": _boxes(own[:, 0]).view(count, frames, 4),
        "share": share.clamp(0, 1),
    }


def is_present(share: Tensor) -> Tensor:
    """Whether a target with these visible shares is to be seen."""
    return share >= _SEEN


_REACH: Final = _SPRITE / 2.6
"""Radius of a sprite's shape in its own pixels; some shapes go beyond it."""


def _sprites(vocabulary: Vocabulary, what: list[Tensor], base: Tensor, generator: Generator) -> Sprites:
    """One thing for each ground colour (n, 3, 1, 1), of these shapes and textures (n,)."""
    count = len(base)
    canvas = torch.zeros(count, 3, _SPRITE, _SPRITE)
    ones = torch.ones(count, 1, 1)
    # Over black: what comes out is the colour times its coverage.
    cover = draw_pattern(
        canvas,
        vocabulary,
        (what[0], what[1]),
        torch.full((2, count, 1, 1), 0.5),
        _REACH * ones,
        0 * ones,
        uniform(0.25, 0.4, count, 1, 1, generator=generator) * _SPRITE,
        uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator),
        contrasting(base, generator),
    )
    return Sprites(canvas, cover[:, None])


def _grounds(base: Tensor, vocabulary: Vocabulary, generator: Generator) -> Tensor:
    """Textured and clouded, (n, 3, S, S)."""
    count = len(base)
    images = base.repeat(1, 1, _GROUND, _GROUND)
    x, y = grid(_GROUND)
    texture = integers(len(vocabulary.textures), count, generator=generator)
    turn = uniform(-torch.pi, torch.pi, count, 1, 1, generator=generator)
    u, v = rotated(x - _GROUND / 2, y - _GROUND / 2, turn)
    period = uniform(0.06, 0.12, count, 1, 1, generator=generator) * _GROUND
    pattern = coverage(by_kind(texture, u, v, period, tuple(vocabulary.textures.values())))
    clouds = torch.rand(count, 1, 9, 9, generator=generator)
    clouds = functional.interpolate(clouds, _GROUND, mode="bilinear")[:, 0]
    for cover, most in ((pattern, 0.3), (clouds, 0.35)):
        other = (base + uniform(-most, most, count, 3, 1, 1, generator=generator)).clamp(0, 1)
        paint_(images, cover, other)
    return images


def _ground_views(grounds: Tensor, pan: Path, size: Size) -> Tensor:
    """What a slowly moving camera sees of each ground in each frame, (n * T, 3, H, W)."""
    # The path of a thing, much reduced: a fifth of the way, a little zoom and turn.
    zoom = pan.zoom**0.3
    turn = 0.1 * (pan.turn - pan.turn[:, :1])
    shown = [side / _GROUND for side in size]
    cos, sin = (turn.cos() * zoom * 0.9, turn.sin() * zoom * 0.9)
    rows = [
        torch.stack([cos * shown[1], -sin * shown[0], (pan.x - 0.5) * 0.3], -1),
        torch.stack([sin * shown[1], cos * shown[0], (pan.y - 0.5) * 0.3], -1),
    ]
    return _sampled(grounds, torch.stack(rows, -2), size, padding="reflection")


def _warped(sprites: Sprites, path: Path, radius: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Colour times coverage (n * T, 3, H, W) and coverage (n * T, 1, H, W) of things on their paths."""
    height, width = size
    scale = path.zoom * radius / _REACH
    # From the frame's pixels to the sprite's: turned back, divided by the scale; grids run from -1 to 1.
    factor = 1 / (scale.clamp(min=1e-3) * _SPRITE / 2)
    cos, sin = path.turn.cos() * factor, path.turn.sin() * factor
    x, y = (path.x - 0.5) * width, (path.y - 0.5) * height
    rows = [
        torch.stack([cos * width / 2, sin * height / 2, -(cos * x + sin * y)], -1),
        torch.stack([-sin * width / 2, cos * height / 2, sin * x - cos * y], -1),
    ]
    painted = torch.cat([sprites.colour, sprites.cover], 1)
    out = _sampled(painted, torch.stack(rows, -2), size, padding="zeros")
    is_there = (path.zoom > 0).flatten()[:, None, None, None]
    return out[:, :3] * is_there, out[:, 3:] * is_there


def _sampled(images: Tensor, maps: Tensor, size: Size, *, padding: str) -> Tensor:
    """Pictures (n, C, S, S) seen through affine maps (n, T, 2, 3), (n * T, C, H, W)."""
    count, frames = maps.shape[:2]
    points = functional.affine_grid(maps.flatten(0, 1), [count * frames, 1, *size], align_corners=False)
    points = points.reshape(count, 1, frames * size[0], size[1], 2)
    seen = [
        # One call for each video: its picture is not copied for every frame.
        functional.grid_sample(image[None], where, mode="bilinear", padding_mode=padding, align_corners=False)
        for image, where in zip(images, points, strict=True)
    ]  # (1, C, T * H, W) each
    stacked = torch.cat(seen).reshape(count, -1, frames, *size)
    return stacked.transpose(1, 2).flatten(0, 1)


def _boxes(cover: Tensor) -> Tensor:
    """x, y, w, h (m, 4) of what is covered by half or more in each of (m, H, W); zeros where nothing is."""
    there = cover >= 0.5
    out = []
    for axis in (1, 2):
        line = there.any(axis)  # along x, then along y
        length = line.shape[1]
        first = line.to(torch.uint8).argmax(1)
        last = length - line.flip(1).to(torch.uint8).argmax(1)
        out.append((first, last - first))
    (x, w), (y, h) = out
    boxes = torch.stack([x, y, w, h], 1).to(torch.float32)
    return boxes * there.flatten(1).any(1)[:, None]
