"""Numbers with limits, for the annotations of constructors: `lr: NonNegativeFloat = 1e-3`.

A configuration is checked against them before anything is built; the help shows them. Constructors of methods are
checked whoever calls them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from peft_modal.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Limits of a number; what is not finite is outside of any."""

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    """Whether `low` itself is excluded."""
    is_below: bool = False
    """Whether `high` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        is_above = self.low < value if self.is_open else self.low <= value
        return math.isfinite(value) and is_above and (value < self.high if self.is_below else value <= self.high)

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isinf(self.high):
            return f"above {low}" if self.is_open else f"of at least {low}"
        if self.is_open:
            return f"above {low}, {'below' if self.is_below else 'at most'} {high}"
        return f"from {low} to {'below ' if self.is_below else ''}{high}"


PositiveInt: TypeAlias = Annotated[int, Range(1)]
NonNegativeInt: TypeAlias = Annotated[int, Range(0)]
PositiveFloat: TypeAlias = Annotated[float, Range(0, is_open=True)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(0)]
Share: TypeAlias = Annotated[float, Range(0, 1)]
DropRate: TypeAlias = Annotated[float, Range(0, 1, is_below=True)]
"""Probability of leaving something out that may not always be left out."""


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


def hints_of(function: Callable[..., object]) -> dict[str, Any]:
    """Annotations with their ranges; none where one of them names what is imported for type checkers only."""
    with contextlib.suppress(NameError, TypeError):
        return get_type_hints(function, include_extras=True)
    return {}


def ranged(function: Callable[Concatenate[T, P], None], *, where: str) -> Callable[Concatenate[T, P], None]:
    """A constructor that refuses numbers outside the ranges of its annotations.

    Args:
        function: The constructor.
        where: The key of a configuration below which its arguments stand.
    """
    names = list(inspect.signature(function).parameters)[1:]
    # Not before the first call: a class may be named in its own annotations.
    hints = functools.cache(lambda: hints_of(function))

    @functools.wraps(function)
    def checked(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
        problems = []
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            limits = outside(value, hints().get(name))
            if limits is not None:
                problems.append(f"{where}.{name}: expected a number {limits}, got {value}")
        if problems:
            raise ConfigError(*problems)
        function(self, *args, **kwargs)

    return checked
