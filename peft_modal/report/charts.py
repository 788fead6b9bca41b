"""Charts that several reports draw: curves over a run, and a labelled matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    short = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in labels]
    fontsize = min(12.0, 0.56 * cell)
    margin = 36 + 0.62 * fontsize * max(map(len, short), default=0)
    side = size * cell + margin

    def draw(figure: Any) -> None:  # noqa: ANN401 — a matplotlib figure
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for i, row in enumerate(counts):
            total = sum(row)
            for j, count in enumerate(row):
                if count == 0:
                    continue
                share = count / total
                # Opacity and not a colour scale: it reads on light and on dark ground.
                opacity = 0.12 + 0.88 * share
                colour = RIGHT if i == j else WRONG
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, alpha=opacity, linewidth=0))
                if size <= _COUNTED:
                    ink = FILLED if opacity > _FULL else INK
                    # At 0.62 of its size a digit of the widest usual font is as broad as a cell allows.
                    fitting = min(fontsize, 1.4 * cell / len(str(count)))
                    axes.text(j, i, str(count), ha="center", va="center_baseline", color=ink, fontsize=fitting)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.set_xticks(range(size), short, rotation=90, rotation_mode="anchor", ha="left", va="center")
        axes.set_yticks(range(size), short)
        axes.tick_params(axis="both", labelsize=fontsize, length=0, labelcolor=INK, pad=4)
        axes.tick_params(axis="x", bottom=False, labelbottom=False, top=False, labeltop=True)
        axes.set_xticks([edge - 0.5 for edge in range(size + 1)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(size + 1)], minor=True)
        axes.grid(visible=True, which="minor", axis="both", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_ylabel(rows, loc="top")
        axes.set_xlabel(columns, loc="left")
        axes.xaxis.set_label_position("top")

    data = {"rows": rows, "columns": columns, "labels": list(labels), "counts": [list(row) for row in counts]}
    right = sum(counts[i][i] for i in range(size))
    label = f"{rows} against {columns}: {right} of {sum(map(sum, counts))} on the diagonal"
    return Chart(data, draw, side, side, label, title, shrinks=False)
