"""The plot: the metric over the number of trained parameters."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from peft_modal.comparison.plan import Plan
from peft_modal.comparison.table import Row, Style

_INK: Final = "#1b2733"
_FAINT: Final = "#8a96a3"
_POINT: Final = "#0b6e99"
_MARKER_PT: Final = 7.0
_RADII_PT: Final = (9.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0, 100.0, 125.0)
_ANGLES: Final = 24
_SETTINGS: Final[dict[Any, Any]] = {
    "svg.hashsalt": "peft_modal",  # the same table gives the same file
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def draw(plan: Plan, table: Sequence[Row]) -> tuple[str, bytes]:
    """The plot as SVG and as PNG."""
    with rc_context(_SETTINGS):
        figure, _ = plot(plan, table)
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.savefig(pixels, format="png", dpi=160)
    return vector.getvalue(), pixels.getvalue()


def plot(plan: Plan, table: Sequence[Row]) -> tuple[Figure, list[Text]]:
    """The figure and the labels of its points; methods without a result are left out."""
    style = Style.of(plan, table)
    factor = 100.0 if style.percent else 1.0
    shown = [row for row in table if row.mean is not None and row.trained]
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, head included")
    axes.set_ylabel(style.title("test" if all(row.split == "test" for row in shown) else "validation"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not shown:
        axes.text(0.5, 0.5, "no method is finished", transform=axes.transAxes, ha="center")
        return figure, []
    x = [float(row.trained or 0) for row in shown]
    y = [factor * float(row.mean or 0) for row in shown]
    spread = [factor * (row.deviation or 0) for row in shown]
    decades = math.log10(max(x) / min(x))
    pad = 10 ** max(0.12 * decades, 0.5 - decades / 2)  # a decade at least, so that the axis has ticks
    axes.set_xlim(min(x) / pad, max(x) * pad)
    axes.errorbar(
        x, y, yerr=spread, fmt="o", color=_POINT, ecolor=_FAINT, elinewidth=1.2, capsize=3, markersize=_MARKER_PT
    )
    axes.margins(y=0.12)
    figure.draw_without_rendering()
    axes.set_ylim(axes.get_ylim())  # labels must not move it
    labels = _label(figure, axes, [row.method for row in shown], list(zip(x, y, spread, strict=True)))
    return figure, labels


def _label(figure: Figure, axes: Any, names: Sequence[str], points: Sequence[tuple[float, float, float]]) -> list[Text]:  # noqa: ANN401 — untyped library
    """Put a name beside each point, where it covers neither another name nor a point nor an error bar."""
    pixel = figure.dpi / 72
    frame: Bbox = axes.get_window_extent()
    at = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = []
    for (x, y, spread), (px, py) in zip(points, at, strict=True):
        half = 0.5 * _MARKER_PT * pixel + 2
        taken.append(Bbox.from_extents(px - half, py - half, px + half, py + half))
        low, high = (axes.transData.transform((x, value))[1] for value in (y - spread, y + spread))
        taken.append(Bbox.from_extents(px - 4 * pixel, low, px + 4 * pixel, high))
    labels = []
    for name, (px, py) in zip(names, at, strict=True):
        label = axes.text(0, 0, name, transform=None, ha="center", va="center", fontsize=9)
        own = label.get_window_extent()
        centre, radius = _place((px, py), own.width, own.height, frame, taken, pixel)
        label.set_transform(axes.transData)
        label.set_position(axes.transData.inverted().transform(centre))
        taken.append(_box(centre, own.width, own.height))
        labels.append(label)
        if radius > _RADII_PT[0]:
            # In data coordinates, since the picture may be saved at another resolution.
            ends = axes.transData.inverted().transform([(px, py), centre])
            axes.annotate(
                "", xy=ends[0], xytext=ends[1], xycoords="data", textcoords="data",
                arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.7, "shrinkA": 7, "shrinkB": 5},
            )  # fmt: skip
    return labels


def _place(
    point: tuple[float, float], width: float, height: float, frame: Bbox, taken: Sequence[Bbox], pixel: float
) -> tuple[tuple[float, float], float]:
    """The nearest free centre for a box beside a point, and its distance in points; all lengths in pixels."""
    for radius in _RADII_PT:
        for step in range(_ANGLES):
            angle = 2 * math.pi * step / _ANGLES
            gap = (radius - _RADII_PT[0]) * pixel
            horizontal = math.cos(angle) * (width / 2 + _RADII_PT[0] * pixel + gap)
            vertical = math.sin(angle) * (height / 2 + _RADII_PT[0] * pixel + gap)
            centre = (point[0] + horizontal, point[1] + vertical)
            box = _box(centre, width, height)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                return centre, radius
    return (point[0], point[1] + height + _RADII_PT[0] * pixel), _RADII_PT[0]


def _box(centre: tuple[float, float], width: float, height: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - width / 2 - 2, centre[1] - height / 2 - 1, width + 4, height + 2)
