"""Runs of blocks that look alike, so that a person reads one of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def runs(items: Sequence[T], *, alike: Callable[[T], Hashable]) -> list[list[T]]:
    """Neighbours that are alike, together."""
    found: list[list[T]] = []
    for item in items:
        if found and alike(found[-1][-1]) == alike(item):
            found[-1].append(item)
        else:
            found.append([item])
    return found


def common_name(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: `blocks.0.fc1` to `blocks.11.fc1` as `blocks.0-11.fc1`.

    Parts that differ otherwise become `*`.
    """
    parts = [name.split(".") for name in dict.fromkeys(names)]
    if len(parts) == 1:
        return names[0]
    if len({len(part) for part in parts}) > 1:
        return "*"
    return ".".join(_common(column) for column in zip(*parts, strict=True))


def shown_numbers(numbers: Sequence[int]) -> str:
    """`0-11`, or `0, 3, 7`."""
    ordered = sorted(set(numbers))
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ", ".join(map(str, ordered))


def _common(column: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(column))
    if len(distinct) == 1:
        return distinct[0]
    if all(value.isdigit() for value in distinct):
        numbers = sorted(map(int, distinct))
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}-{numbers[-1]}"
    return "*"
