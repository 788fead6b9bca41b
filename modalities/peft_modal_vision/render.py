"""Drawing a picture for a report, with what belongs to it: masks, or what a decision rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from peft_modal_vision.palette import IGNORED, coloured
from peft_modal_vision.segmentation_report import FOUND

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OPACITY: Final = 0.62
"""Of a mask over its picture."""


def render(axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> None:
    """Draw the `image` (3, H, W) of a sample, beside it its `mask` and the one that was found, or its relevance.

    Args:
        axes: Empty, square.
        sample: One picture, with the `mean` and `deviation` (3,) that it was normalised by; `mask` (H, W) and `found`
            (H, W) where pixels were classified; `relevance` (H, W) where that is known.
        prediction: Not drawn; the report writes it below.
    """
    del prediction
    shift, scale = (sample[name].float()[:, None, None] for name in ("mean", "deviation"))
    pixels = (sample["image"].float() * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
    if FOUND in sample:
        pixels = _with_masks(pixels, sample["mask"], sample[FOUND])
    axes.imshow(pixels, interpolation="nearest")
    if "relevance" in sample:
        _enclose(axes, sample["relevance"].float())


def _enclose(axes: Axes, relevance: Tensor) -> None:
    """A line around the eighth of the picture that speaks most for a decision, at the grain of a patch or so."""
    height, width = relevance.shape
    cell = max(1, round(min(height, width) / 8))
    coarse = functional.avg_pool2d(relevance.clamp(min=0)[None, None], cell, ceil_mode=True)
    smooth = functional.interpolate(coarse, (height, width), mode="bicubic")[0, 0]
    level = float(smooth.flatten().quantile(7 / 8))
    if not float(smooth.min()) < level < float(smooth.max()):
        return
    for colour, line in (("#000000", 2.6), ("#ffffff", 1.2)):  # reads on any picture
        axes.contour(smooth.numpy(), levels=[level], colors=[colour], linewidths=[line])


def _with_masks(pixels: np.ndarray, mask: Tensor, found: Tensor) -> np.ndarray:
    """The picture and its mask, below them the mask that was found and the wrong pixels; (2H + gap, 2W + gap, 4)."""
    true, guess = mask.numpy(), found.numpy()
    pixels = _sized(pixels, true.shape)
    counted = true != IGNORED
    wrong = (true != guess) & counted
    faded = 0.35 * pixels + 0.65
    parts = (
        pixels, _over(pixels, true, counted), _over(pixels, guess, np.ones_like(counted)),
        np.where(wrong[..., None], coloured(guess), faded),
    )  # fmt: skip
    height, width = true.shape
    gap = max(1, width // 32)
    sheet = np.zeros((2 * height + gap, 2 * width + gap, 4))
    for number, part in enumerate(parts):
        top, left = (number // 2) * (height + gap), (number % 2) * (width + gap)
        sheet[top : top + height, left : left + width] = np.dstack([part, np.ones((height, width))])
    return sheet


def _sized(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The picture as large as its mask, which keeps the size of its file."""
    if pixels.shape[:2] == size:
        return pixels
    image = functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], size, mode="bilinear")
    return image[0].permute(1, 2, 0).numpy()


def _over(pixels: np.ndarray, labels: np.ndarray, shown: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = (1 - _OPACITY) * pixels.mean(-1, keepdims=True) + _OPACITY * coloured(labels)
    return np.where(shown[..., None], mixed, pixels)
