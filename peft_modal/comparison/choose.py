"""Choosing a learning rate, by validation figures and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Choice:
    """A learning rate and what it was chosen by."""

    lr: float | None
    """None where the task has none."""
    values: dict[float | None, float | None]
    """Validation figure of every learning rate tried, ascending; None where the run failed or has no finite figure."""

    @property
    def at_edge(self) -> bool:
        """Whether it is the smallest or the largest of several tried: the best may lie outside."""
        tried = list(self.values)
        return len(tried) > 1 and self.lr in {tried[0], tried[-1]}


def choose(values: Mapping[float | None, float | None], mode: Mode) -> Choice | None:
    """The learning rate with the best figure, of equals the smallest.

    Args:
        values: Validation figure of each learning rate, in ascending order of learning rate; None for none.
        mode: Whether the figure shall be large or small.

    Returns:
        None where there is none that could be chosen.
    """
    kept = {lr: value if value is not None and math.isfinite(value) else None for lr, value in values.items()}
    sign = 1.0 if mode == "min" else -1.0
    # `min` keeps the first of equals.
    finite = [(sign * value, lr) for lr, value in kept.items() if value is not None]
    return Choice(min(finite, key=lambda one: one[0])[1], kept) if finite else None
