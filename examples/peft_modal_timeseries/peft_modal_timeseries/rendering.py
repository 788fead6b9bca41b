"""How a report draws one series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPACING = 4.0
"""Distance between channels, in standard deviations of a normalised series."""


def render(axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> None:
    """Draw the channels of `sample["series"]` (C, T) below each other.

    A class is no place in the series, so nothing of `prediction` is drawn; the report writes it beside the picture.
    """
    del prediction
    series = sample["series"]
    for channel, values in enumerate(series):
        axes.plot([float(value) - channel * SPACING for value in values], linewidth=1.0)
    axes.set_xlim(0, series.shape[1] - 1)
    axes.set_yticks([-channel * SPACING for channel in range(len(series))], [str(c + 1) for c in range(len(series))])
    axes.set_xlabel("step")
    axes.set_ylabel("channel")
