"""Numbers with limits, for the annotations of constructors: `lr: NonNegativeFloat = 1e-3`.

A configuration is checked against them before anything is built; the help shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, TypeAlias, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Limits of a number; what is not finite is outside of any."""

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    """Whether `low` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (self.low < value if self.is_open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isinf(self.high):
            return f"above {low}" if self.is_open else f"of at least {low}"
        return f"above {low}, at most {high}" if self.is_open else f"from {low} to {high}"


PositiveInt: TypeAlias = Annotated[int, Range(1)]
NonNegativeInt: TypeAlias = Annotated[int, Range(0)]
PositiveFloat: TypeAlias = Annotated[float, Range(0, is_open=True)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(0)]
Share: TypeAlias = Annotated[float, Range(0, 1)]


def ranges_in(hint: object) -> Iterator[Range]:
    """The limits anywhere inside an annotation.

    Yields:
        One after the other, outer ones first.
    """
    if get_origin(hint) is Annotated:
        yield from (item for item in get_args(hint)[1:] if isinstance(item, Range))
        hint = get_args(hint)[0]
    for option in get_args(hint):
        yield from ranges_in(option)


def outside(value: object, hint: object) -> Range | None:
    """The limits that a number, or one in a list, does not keep to; None where it keeps to them all."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]
    return next((limits for limits in ranges_in(hint) for number in numbers if number not in limits), None)
