"""Position embeddings of a grid of patches, for spectrograms of another length or of other mel bins."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int]
"""Patches along frequency and along time."""


def adapted(positions: Tensor, old: Grid, new: Grid, *, prefix: int = 2) -> Tensor:
    """Positions for another grid, as AST's authors make them (Gong et al., Interspeech 2021), time before frequency.

    Where an axis gets shorter, its middle is cut out, so that a step keeps its meaning (100 ms); where it gets longer,
    it is interpolated bilinearly.

    Args:
        positions: (1, prefix + F * T, D), frequency the slow axis.
        old: Its grid.
        new: The grid wanted.
        prefix: Tokens in front of the patches; their positions stay.

    Returns:
        (1, prefix + F' * T', D).
    """
    if old == new:
        return positions
    grid = positions[:, prefix:].transpose(1, 2).reshape(len(positions), -1, *old)  # (1, D, F, T)
    for axis, (before, after) in reversed(list(enumerate(zip(old, new, strict=True)))):
        if after <= before:
            grid = grid.narrow(2 + axis, before // 2 - after // 2, after)
        else:
            size = [*grid.shape[2:]]
            size[axis] = after
            grid = functional.interpolate(grid, size, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)
