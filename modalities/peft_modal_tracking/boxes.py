"""Boxes: x1, y1, x2, y2 from 0, continuous, x2 = x1 + width; on disk x, y, width, height."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_modal.errors import ConfigError

Size = tuple[int, int]
"""Height and width."""
_ALMOST_ONE = 1 - 1e-4


def size_of(given: int | list[int], where: str) -> Size:
    """(height, width) of one number or two.

    Raises:
        ConfigError: There are more, or fewer.
    """
    if isinstance(given, int):
        return given, given
    if len(given) != 2:
        raise ConfigError(f"{where}: a size is one number or [height, width], got {given}")
    return given[0], given[1]


def to_corners(boxes: Tensor) -> Tensor:
    """X, y, w, h (..., 4) as x1, y1, x2, y2."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def to_sizes(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 (..., 4) as x, y, w, h."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def rasterised(boxes: Tensor) -> Tensor:
    """The whole cells that boxes touch, (..., 4) int64: first column and row, and the ones after the last."""
    first, last = boxes[..., :2].floor(), (boxes[..., 2:] + _ALMOST_ONE).floor()
    return torch.cat([first, last], dim=-1).to(torch.int64)


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """The parts of boxes (..., 4) inside a picture; of a box outside nothing but an edge or a corner is left."""
    limits = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), limits)


def areas(boxes: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4); 0 where a side is negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) of the intersection and of the union of pairs of boxes (..., 4)."""
    corners = torch.cat([torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])], -1)
    shared = areas(corners)
    return shared, areas(one) + areas(other) - shared


def is_box(boxes: Tensor) -> Tensor:
    """Whether boxes (..., 4) have a positive width and height."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def cells_of(boxes: Tensor, size: Size, grid: Size) -> Tensor:
    """Which cells of a grid over a picture boxes touch.

    Args:
        boxes: In pixels, (B, 4); what is outside does not count.
        size: Of the picture.
        grid: Rows and columns.

    Returns:
        (B, rows, columns) int64, 1 or 0.
    """
    scale = torch.tensor([grid[1] / size[1], grid[0] / size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
    touched = clipped(rasterised(clipped(boxes, size) * scale), grid)
    rows, columns = (torch.arange(n, device=boxes.device) for n in grid)
    across = (columns >= touched[:, None, 0]) & (columns < touched[:, None, 2])
    down = (rows >= touched[:, None, 1]) & (rows < touched[:, None, 3])
    return (down[:, :, None] & across[:, None, :]).to(torch.int64)
