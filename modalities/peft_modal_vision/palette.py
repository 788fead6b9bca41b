"""Class numbers in masks: the one that does not count, and a colour for each, neighbours far apart."""

from __future__ import annotations

import colorsys
from typing import Final

import numpy as np

IGNORED: Final = 255
"""The label of pixels that are neither trained on nor counted."""
_GOLDEN: Final = 0.6180339887498949
"""Steps of this share of the circle never come back near where they were."""


def palette(count: int) -> np.ndarray:
    """Colours (count, 3) uint8; the first ones are the same whatever the count."""
    made = np.zeros((count, 3), dtype=np.uint8)
    for label in range(count):
        value = (0.92, 0.62, 0.78)[label % 3]
        colour = colorsys.hsv_to_rgb((label * _GOLDEN + 0.58) % 1.0, 0.72 if label % 2 == 0 else 0.5, value)
        made[label] = [round(255 * channel) for channel in colour]
    return made


def coloured(labels: np.ndarray) -> np.ndarray:
    """Labels (H, W) in 0..255 as colours (H, W, 3) in 0..1."""
    shown: np.ndarray = palette(256)[labels.astype(np.int64)] / 255.0
    return shown
