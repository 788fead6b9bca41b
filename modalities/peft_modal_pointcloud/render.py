"""Drawing a point cloud for a report: an orthographic view in which near points stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from peft_modal.report.style import CYCLE

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

_AZIMUTH = math.radians(35)
_ELEVATION = math.radians(22)
_DARKEST, _LIGHTEST = 0.22, 0.85
"""Part of the colour map that is used: its ends vanish on a dark or on a light ground."""


SHOWN: Final = "shown"
"""The key of the parts (P,) that a sample is drawn by; points of none, below the first one, are grey."""
STRONG: Final = "strong"
"""The key of the points that stand out, (P,) bool; the rest is drawn pale."""
VALUES: Final = "values"
"""The key of one value per point, (P,) in -1..1, that a sample is drawn by."""
MARKS: Final = "marks"
"""The key of places (M, 3) that are marked by dots."""
LEGEND: Final = "legend"
"""The key of the names of the category's parts, from `first_part` on; "" for one that is not to be named."""
FIRST_PART: Final = "first_part"
"""The key of the first part of the sample's category."""
_COLOURS: Final = (*CYCLE, "#7f8794", "#d9a514")
_GREY: Final = "#8a8f98"
_PALE: Final = 0.3
_MARK: Final = 34.0
_MARK_COLOUR: Final = "#d1580b"
_COLUMNS: Final = 3
_LINE: Final = 0.085
"""Of the legend, in heights of the picture."""
_FONT: Final = 10.5


def render(axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> None:
    """Draw the `points` (P, 3) of a sample, y up; far points are smaller and paler.

    Colours tell the height; the part where the points have parts, whose names stand below; or their values.

    Args:
        axes: Empty, square, with equal units.
        sample: One cloud; `shown` (P,), `first_part`, `legend` and perhaps `strong` (P,) where its points have parts;
            `values` (P,) in their place; `marks` (M, 3) beside any of them.
        prediction: Not drawn; the report writes it below.
    """
    del prediction
    points = sample["points"].float()
    if SHOWN in sample:
        _draw_parts(axes, points, sample)
    else:
        from matplotlib import colormaps

        if VALUES in sample:
            colours = colormaps["coolwarm"](((sample[VALUES] + 1) / 2).numpy())
        else:
            height = _unit_range(points[:, 1])
            colours = colormaps["viridis"](_DARKEST + (_LIGHTEST - _DARKEST) * height.numpy())
        _scatter(axes, points, colours, strength=_pale(points) if MARKS in sample else None)
        _limit(axes, view(points)[:, :2])
    if MARKS in sample:
        right, up, _ = view(sample[MARKS].float()).unbind(-1)
        axes.scatter(right, up, s=_MARK, c=_MARK_COLOUR, edgecolors="white", linewidths=0.8, zorder=3)


def _draw_parts(axes: Axes, points: Tensor, sample: Mapping[str, Any]) -> None:
    from matplotlib.colors import to_rgba_array

    palette = to_rgba_array(_COLOURS)
    labels = sample[SHOWN] - int(sample[FIRST_PART])
    strong = sample.get(STRONG)
    strength = None if strong is None else torch.where(strong, 1.0, _PALE)
    colours = palette[(labels % len(palette)).numpy()]
    colours[(labels < 0).numpy()] = to_rgba_array(_GREY)
    _scatter(axes, points, colours, strength=strength)
    _limit(axes, view(points)[:, :2])
    named = [(name, _COLOURS[number % len(_COLOURS)]) for number, name in enumerate(sample[LEGEND]) if name]
    lines = -(-len(named) // _COLUMNS)
    low, high = axes.get_ylim()
    # Room below the cloud, and as much less of it at its sides, so that units stay equal.
    room = (high - low) * _LINE * lines / (1 - _LINE * lines)
    left, right = axes.get_xlim()
    axes.set_ylim(low - room, high)
    axes.set_xlim(left - room / 2, right + room / 2)
    for place, (name, colour) in enumerate(named):
        x, y = (place % _COLUMNS) / _COLUMNS, (lines - 1 - place // _COLUMNS + 0.25) * _LINE
        axes.text(x, y, name, color=colour, fontsize=_FONT, transform=axes.transAxes, weight="bold")


def _scatter(
    axes: Axes, points: Tensor, colours: np.ndarray, *, strength: Tensor | None = None, shift: float = 0.0
) -> None:
    """Points with a colour (P, 4) each, near ones last; `strength` (P,) in 0..1 makes them paler."""
    right, up, near = view(points).unbind(-1)
    order = near.argsort()
    near = _unit_range(near)
    alpha = 0.35 + 0.65 * near
    colours = colours.copy()
    colours[:, 3] = alpha if strength is None else alpha * strength
    size = 4.0 + 14.0 * near.square()
    axes.scatter(right[order] + shift, up[order], s=size[order], c=colours[order.numpy()], linewidths=0)


def _pale(points: Tensor) -> Tensor:
    return torch.full((len(points),), _PALE)


def _limit(axes: Axes, flat: Tensor) -> None:
    """One scale for both axes, so that shapes keep their proportions, around what was drawn (P, 2)."""
    low, high = flat.amin(0), flat.amax(0)
    middle_right, middle_up = ((low + high) / 2).tolist()
    half = 0.54 * max(float((high - low).max()), 1e-6)
    axes.set_xlim(middle_right - half, middle_right + half)
    axes.set_ylim(middle_up - half, middle_up + half)


def view(points: Tensor) -> Tensor:
    """Points (P, 3) with y up as (P, 3) in the picture: to the right, up, and towards the eye."""
    ca, sa, ce, se = (f(angle) for angle in (_AZIMUTH, _ELEVATION) for f in (math.cos, math.sin))
    rotation = torch.tensor([[ca, 0.0, -sa], [-sa * se, ce, -ca * se], [sa * ce, se, ca * ce]])
    return points @ rotation.T


def _unit_range(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)
