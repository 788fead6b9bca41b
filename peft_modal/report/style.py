"""The project's one matplotlib style, and figures as text for a page.

Colours are Okabe and Ito's, which people with any common colour blindness can tell apart. Every colour of the style
stands for a role: `svg` writes roles as CSS variables, so that an inline picture follows the page's light or dark
surroundings; elsewhere (PNG, PDF) they are plain colours for a light ground.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

INK: Final = "#1b2028"
"""Text and anything that must be read."""
MUTED: Final = "#5d6673"
"""Axes and secondary text."""
GRID: Final = "#d9dde3"
"""Lines that only guide the eye."""
CYCLE: Final = ("#0b6cb0", "#d1580b", "#0a8a67", "#b3589a", "#8a6d00", "#3d9ad1")
"""Series, in this order: blue, vermilion, green, purple, ochre, sky."""
RIGHT: Final = CYCLE[0]
"""What is as it should be."""
WRONG: Final = CYCLE[1]
"""What is not."""

FILLED: Final = "#ffffff"
"""Text on a filled patch of `RIGHT` or `WRONG`."""

_ROLES: Final = {INK: "ink", MUTED: "muted", GRID: "grid", FILLED: "filled"} | {
    colour: f"c{i}" for i, colour in enumerate(CYCLE)
}
"""Names of the CSS variables; the page gives them their values."""

STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12.0,
    "text.color": INK,
    # Names of classes and files are text, whatever `$` they contain.
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 12.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 11.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72.0,
    # Text stays text: it can be searched, copied, and is drawn with the page's own letters.
    "svg.fonttype": "none",
    # The same figure gives the same file.
    "svg.hashsalt": "peft_modal",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the project's style inside; matplotlib's own settings are left as they were."""
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(color=CYCLE)}), warnings.catch_warnings():
        # The page's font has the letters that matplotlib's own lacks; only measuring is off by a little.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def svg(draw: Callable[[Any], None], *, width: float, height: float, name: str, label: str) -> str:
    """A drawing as an inline `<svg>` element whose colours are CSS variables of the page.

    Args:
        draw: Fills an empty matplotlib figure.
        width: In CSS pixels.
        height: In CSS pixels.
        name: Letters and digits; unique on the page, since identifiers inside are made from it.
        label: What the picture shows, for those who do not see it.
    """
    from markupsafe import escape
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    head += f' role="img" aria-label="{escape(label)}" style="width: {width:g}px; max-width: 100%; height: auto"'
    # Tags only: a class may be called like a colour.
    return re.sub(r"<[^>]*>", lambda tag: _on_page(tag[0], name), f"{head}>{body}")


def _on_page(tag: str, name: str) -> str:
    for colour, role in _ROLES.items():
        tag = tag.replace(colour, f"var(--{role}, {colour})")
    # Identifiers are unique in a file of its own, not on a page with several pictures.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)


def png(draw: Callable[[Any], None], *, size: float, scale: float = 2.0) -> bytes:
    """A square drawing as PNG on a transparent ground.

    Args:
        draw: Fills one axes without frame or ticks and with equal units.
        size: Side in CSS pixels.
        scale: Pixels of the picture per CSS pixel.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(size / 72, size / 72))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.set_aspect("equal")
        draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=72 * scale, transparent=True, metadata={"Software": None})
    return file.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A file as a `src` that needs no request."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()
