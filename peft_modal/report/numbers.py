"""How values are written for people: units, digits, thousands."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["text", "count", "number", "share", "bar", "bytes", "megabytes", "milliseconds", "seconds"]
"""What a value is; `share` and `bar` are fractions of 1."""
TEXTUAL: Final[frozenset[Kind]] = frozenset({"text"})
"""Kinds that read from the left; the others are numbers and stand right."""

_GAP: Final = "\N{NO-BREAK SPACE}"
_NOTHING: Final = "–"  # noqa: RUF001 — an en dash is meant


def show(value: str | float | None, kind: Kind) -> str:  # noqa: PLR0911 — one for each kind
    """A value with its unit, a dash for None."""
    if value is None:
        return _NOTHING
    if isinstance(value, str):
        return value
    match kind:
        case "text":
            return str(value)
        case "count":
            return f"{value:,.0f}"
        case "number":
            return f"{value:.4g}"
        case "share" | "bar":
            return _share(value)
        case "bytes":
            return _bytes(value)
        case "megabytes":
            return f"{value:,.0f}{_GAP}MB"
        case "milliseconds":
            return f"{value:.3g}{_GAP}ms" if value < 1000 else f"{value / 1000:.3g}{_GAP}s"
        case "seconds":
            return _seconds(value)


def _share(value: float) -> str:
    """In percent; small shares keep two digits, since a share of 0.0 % would say that nothing is there."""
    percent = 100 * value
    digits = f"{percent:.2g}" if 0 < percent < 0.1 else f"{percent:.1f}"
    return f"{digits}{_GAP}%"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{_GAP}{unit}" if value < 100 * size else f"{value / size:,.0f}{_GAP}{unit}"
    return f"{value:.0f}{_GAP}bytes"


def _seconds(value: float) -> str:
    if value < 59.95:  # above, it would be written as 60.0
        return f"{value:.1f}{_GAP}s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_GAP}h{_GAP}{minutes}{_GAP}min" if hours else f"{minutes}{_GAP}min{_GAP}{seconds}{_GAP}s"
