"""How a report draws one sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def render(
    axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None
) -> None:
    """Draw every feature of `sample["sequence"]` (T, F) over the steps."""
    del (
        prediction
    )  # the report writes the class; draw here what lies in the sample, such as boxes
    for values in sample["sequence"].T:
        axes.plot(values.tolist(), linewidth=1.0)
    axes.set_xlabel("step")
