"""What there is to draw: colours, shapes, grounds, patterns and arrangements, by name and in a fixed order."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Rgb = tuple[float, float, float]
Pairs = Literal["train", "held_out", "all"]

COLOURS: Final[dict[str, Rgb]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.10, 0.25, 0.85),
    "purple": (0.50, 0.12, 0.65),
    "pink": (1.00, 0.52, 0.76),
}
"""Colours of objects."""

SHAPES: Final = ("circle", "square", "triangle", "cross", "diamond", "ring")

GROUNDS: Final[dict[str, tuple[Rgb, Rgb]]] = {
    "white": ((0.96, 0.96, 0.96), (0.80, 0.80, 0.80)),
    "grey": ((0.62, 0.62, 0.62), (0.47, 0.47, 0.47)),
    "black": ((0.06, 0.06, 0.06), (0.23, 0.23, 0.23)),
    "brown": ((0.42, 0.29, 0.18), (0.55, 0.41, 0.29)),
}
"""Colours of backgrounds, and the second tone of each that patterns are made with."""

PATTERNS: Final[dict[str, str]] = {"plain": "", "striped": "stripes", "checked": "checks", "wavy": "waves"}
"""Patterns of backgrounds: adjective and noun."""

PLACES: Final = ("in the center", "at the top", "at the bottom", "on the left", "on the right")
"""Where a single object is."""

RELATIONS: Final = ("left of", "right of", "above", "below")
"""Where the first of two objects is, seen from the second."""

SIZES: Final = ("small", "large")

HELD_OUT: Final = (
    ("red", "cross"),
    ("orange", "ring"),
    ("yellow", "diamond"),
    ("green", "triangle"),
    ("cyan", "square"),
    ("blue", "circle"),
    ("purple", "ring"),
    ("pink", "cross"),
)
"""Pairs that no picture for training has, whatever its background: one shape of each colour."""


def pair_mask(pairs: Pairs) -> Tensor:
    """Which pairs may be drawn, (colours, shapes) bool."""
    held_out = torch.zeros(len(COLOURS), len(SHAPES), dtype=torch.bool)
    colours = list(COLOURS)
    for colour, shape in HELD_OUT:
        held_out[colours.index(colour), SHAPES.index(shape)] = True
    return {"train": ~held_out, "held_out": held_out, "all": torch.ones_like(held_out)}[pairs]


def with_article(words: str) -> str:
    """`a red circle`, `an orange circle`."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def object_name(colour: int, shape: int, size: int | None = None) -> str:
    """An object by the numbers of its colour, shape and, if it shall be said, size: `a small red circle`."""
    words = (*(() if size is None else (SIZES[size],)), list(COLOURS)[colour], SHAPES[shape])
    return with_article(" ".join(words))
