"""From the head's map to one box: the window penalty and the choice of a cell."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_modal_heads.tracking_mlp import TrackingOutput
from peft_modal_tracking.boxes import Size


def hann_window(grid: Size) -> Tensor:
    """The outer product of symmetric Hann windows, zero at its borders, (rows, columns) float32."""
    down, across = (torch.hann_window(n, periodic=False) for n in grid)
    return torch.outer(down, across)


def select_box(output: TrackingOutput, size: Size, window: Tensor | None, penalty: float) -> tuple[Tensor, Tensor]:
    """The box of the best cell, and how sure the tracker is.

    Args:
        output: Of the head.
        size: Of the search picture.
        window: Added to the scores with weight `penalty`, (rows, columns); None for none.
        penalty: From 0 to 1.

    Returns:
        Boxes in pixels of the search picture (B, 4), and scores (B,) without the window.
    """
    scores = output.scores.sigmoid()
    ranked = scores if window is None else scores * (1 - penalty) + window.to(scores) * penalty
    best = ranked.flatten(1).argmax(1)
    every = torch.arange(len(best), device=best.device)
    scale = torch.tensor([size[1], size[0]] * 2, dtype=output.boxes.dtype, device=best.device)
    return output.boxes.flatten(1, 2)[every, best] * scale, scores.flatten(1)[every, best]
