"""Drawing a frame for a report, with the true box and the one that was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRAME: Final = "frame"
TRUE: Final = "true_box"
FOUND: Final = "found_box"
_TRUE_COLOUR: Final = "#ffd21f"
_FOUND_COLOUR: Final = "#00c2ff"


def render(axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> None:
    """Draw the `frame` (3, H, W) uint8 of a sample and its boxes x, y, w, h.

    Args:
        axes: Empty, square.
        sample: One frame with `true_box` and `found_box` (4,).
        prediction: Not drawn.
    """
    del prediction
    frame: Tensor = sample[FRAME]
    axes.imshow(frame.permute(1, 2, 0).numpy(), interpolation="nearest")
    for name, colour, style in ((TRUE, _TRUE_COLOUR, "-"), (FOUND, _FOUND_COLOUR, "--")):
        box = sample.get(name)
        if box is not None and bool((box[2:] > 0).all()):
            _outline(axes, box, colour, style)


def _outline(axes: Axes, box: Tensor, colour: str, style: str) -> None:
    """A line around a box, dark below, so that it reads on any picture."""
    from matplotlib.patches import Rectangle

    x, y, width, height = (torch.as_tensor(box) - torch.tensor([0.5, 0.5, 0, 0])).tolist()
    for tint, line, dashes in (("#000000", 2.8, "-"), (colour, 1.5, style)):
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=tint, linewidth=line, linestyle=dashes))
