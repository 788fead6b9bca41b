"""Drawing a point cloud for a report: an orthographic view in which near points stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AZIMUTH = math.radians(35)
_ELEVATION = math.radians(22)
_DARKEST, _LIGHTEST = 0.22, 0.85
"""Part of the colour map that is used: its ends vanish on a dark or on a light ground."""


def render(axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> None:
    """Draw the `points` (P, 3) of a sample, y up, coloured by height; far points are smaller and paler.

    Args:
        axes: Empty, square, with equal units.
        sample: One cloud.
        prediction: Not drawn; the report writes it below.
    """
    from matplotlib import colormaps

    del prediction
    points = sample["points"].float()
    right, up, near = view(points).unbind(-1)
    order = near.argsort()
    near = _unit_range(near)[order]
    height = _unit_range(points[:, 1])[order]
    colours = colormaps["viridis"](_DARKEST + (_LIGHTEST - _DARKEST) * height.numpy())
    colours[:, 3] = 0.35 + 0.65 * near
    axes.scatter(right[order], up[order], s=4.0 + 14.0 * near.square(), c=colours, linewidths=0)
    middle_right, middle_up = ((values.max() + values.min()) / 2 for values in (right, up))
    # One scale for both axes, so that shapes keep their proportions.
    half = 0.54 * max(float(right.max() - right.min()), float(up.max() - up.min()), 1e-6)
    axes.set_xlim(float(middle_right) - half, float(middle_right) + half)
    axes.set_ylim(float(middle_up) - half, float(middle_up) + half)


def view(points: Tensor) -> Tensor:
    """Points (P, 3) with y up as (P, 3) in the picture: to the right, up, and towards the eye."""
    ca, sa, ce, se = (f(angle) for angle in (_AZIMUTH, _ELEVATION) for f in (math.cos, math.sin))
    rotation = torch.tensor([[ca, 0.0, -sa], [-sa * se, ce, -ca * se], [sa * ce, se, ca * ce]])
    return points @ rotation.T


def _unit_range(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)
