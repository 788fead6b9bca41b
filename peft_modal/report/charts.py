"""Charts that several reports draw: curves over a run, and a labelled matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from peft_modal.report.blocks import Chart
from peft_modal.report.numbers import Kind, show
from peft_modal.report.style import FILLED, INK, RIGHT, WRONG

_LONGEST: Final = 22
"""Letters of a label in a matrix; tables have whole names."""
_FULL: Final = 0.78
"""Opacity from which on a cell counts as filled, so that its number keeps the larger contrast."""
_COUNTED: Final = 40
"""Labels up to which every cell shows its number."""
_NUMBERED: Final = 16
"""Columns of a grid up to which every cell shows its number."""


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    kind: Kind = "number",
    width: float = 340,
    height: float = 240,
) -> Chart:
    """Curves over a common axis; each is named at its end, with its last value.

    Args:
        title: What is drawn upwards.
        series: Points (x, y) of each curve by name.
        x_label: What is drawn to the right.
        kind: What the values are.
        width: In CSS pixels.
        height: In CSS pixels.
    """
    kept = {name: sorted(points) for name, points in series.items() if points}

    def draw(figure: Any) -> None:  # noqa: ANN401 — a matplotlib figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = figure.subplots()
        for number, (name, points) in enumerate(kept.items()):
            xs, ys = zip(*points, strict=True)
            # Few points are marked; many would hide the line.
            marker = "os^Dv*"[number % 6] if len(points) <= 30 else None
            axes.plot(xs, ys, marker=marker, label=f"{name} {show(ys[-1], kind)}", clip_on=False)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if kind == "share":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        axes.margins(x=0.03)
        figure.legend(loc="outside upper left", ncols=len(kept), borderpad=0, handlelength=1.6, labelcolor=INK)

    data = {"x": x_label, "kind": kind, "series": {name: [list(point) for point in kept[name]] for name in kept}}
    ends = ", ".join(f"{name} ends at {show(points[-1][1], kind)}" for name, points in kept.items())
    label = f"{title} over {x_label}: {ends}"
    return Chart(data, draw, width, height, label, title)


def matrix_chart(
    labels: Sequence[str], counts: Sequence[Sequence[int]], *, rows: str, columns: str, title: str = ""
) -> Chart:
    """A square matrix of counts, coloured by each row's shares; the diagonal is what should be.

    Args:
        labels: Names of rows and columns.
        counts: [row][column].
        rows: What a row stands for.
        columns: What a column stands for.
        title: Stands above.
    """
    size = len(labels)
    cell = 36 if size <= 14 else 28 if size <= 25 else 20 if size <= _COUNTED else 14
    short = _shortened(labels)
    fontsize = min(12.0, 0.56 * cell)
    margin = 36 + _broadest(short, fontsize)
    side = size * cell + margin

    def draw(figure: Any) -> None:  # noqa: ANN401 — a matplotlib figure
        axes = figure.subplots()
        for i, row in enumerate(counts):
            total = sum(row)
            for j, count in enumerate(row):
                if count == 0:
                    continue
                share = count / total
                # At 0.62 of its size a digit of the widest usual font is as broad as a cell allows.
                fitting = min(fontsize, 1.4 * cell / len(str(count)))
                text = str(count) if size <= _COUNTED else ""
                _fill(axes, i, j, share, text, colour=RIGHT if i == j else WRONG, fontsize=fitting)
        axes.set_aspect("equal")
        upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"}
        _lay_out(axes, short, short, fontsize=fontsize, across=columns, column_style=upright)
        axes.set_ylabel(rows, loc="top")

    data = {"rows": rows, "columns": columns, "labels": list(labels), "counts": [list(row) for row in counts]}
    right = sum(counts[i][i] for i in range(size))
    label = f"{rows} against {columns}: {right} of {sum(map(sum, counts))} on the diagonal"
    return Chart(data, draw, side, side, label, title, shrinks=False)


def heat_chart(
    rows: Sequence[str],
    columns: Sequence[str],
    counts: Sequence[Sequence[int | None]],
    *,
    what: str,
    across: str,
    title: str = "",
) -> Chart:
    """Counts on a grid, coloured by their share of the largest; an absent one is left open.

    Args:
        rows: Names of the rows, from above.
        columns: Names of the columns.
        counts: [row][column]; None where there is nothing to count.
        what: What is counted.
        across: What a column stands for.
        title: Stands above.
    """
    largest = max((count for row in counts for count in row if count), default=0)
    short = _shortened(rows)
    wide, high = (46.0, 26.0) if len(columns) <= _NUMBERED else (18.0, 18.0)
    fontsize = 11.0
    margin = 14 + _broadest(short, fontsize)

    def draw(figure: Any) -> None:  # noqa: ANN401 — a matplotlib figure
        axes = figure.subplots()
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                if count is None:
                    continue
                text = _compact(count) if len(columns) <= _NUMBERED else ""
                _fill(axes, i, j, count / largest if largest else 0.0, text, colour=RIGHT, fontsize=10)
        _lay_out(axes, short, columns, fontsize=fontsize, across=across)

    data = {
        "what": what,
        "across": across,
        "rows": list(rows),
        "columns": list(columns),
        "counts": [list(row) for row in counts],
    }
    total = sum(count for row in counts for count in row if count)
    label = f"{what} by row and {across.lower()}: {total:,} in all, {largest:,} at most in one place"
    return Chart(data, draw, margin + wide * len(columns), 52 + high * len(rows), label, title, shrinks=False)


def _shortened(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in names]


def _broadest(names: Sequence[str], fontsize: float) -> float:
    """Room that the names need, in CSS pixels."""
    return 0.62 * fontsize * max(map(len, names), default=0)


def _fill(axes: Any, i: int, j: int, share: float, text: str, *, colour: str, fontsize: float) -> None:  # noqa: ANN401
    """Colour the cell in row i and column j by a share in 0..1; nothing is left open. Writes the text over it."""
    from matplotlib.patches import Rectangle

    # Opacity and not a colour scale: it reads on light and on dark ground.
    opacity = 0.12 + 0.88 * share if share else 0.0
    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, alpha=opacity, linewidth=0))
    if text:
        ink = FILLED if opacity > _FULL else INK
        axes.text(j, i, text, ha="center", va="center_baseline", color=ink, fontsize=fontsize)


def _lay_out(
    axes: Any,  # noqa: ANN401
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    fontsize: float,
    across: str,
    column_style: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Cells of one unit with lines between them, rows from above, names at the left and on top."""
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, **column_style)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="both", labelsize=fontsize, length=0, labelcolor=INK, pad=4)
    axes.tick_params(axis="x", bottom=False, labelbottom=False, top=False, labeltop=True)
    axes.set_xticks([edge - 0.5 for edge in range(len(columns) + 1)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(len(rows) + 1)], minor=True)
    axes.grid(visible=True, which="minor", axis="both", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(across, loc="left")
    axes.xaxis.set_label_position("top")


def _compact(count: int) -> str:
    """Three digits at most, and a letter."""
    for letter, size in (("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            value = count / size
            return f"{value:.0f}{letter}" if value >= 9.95 else f"{value:.1f}{letter}"
    return str(count)
