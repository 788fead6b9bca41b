"""How a task takes part in a report: it watches an evaluation and gives sections of its own."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from peft_modal.report.blocks import Section


class Collector(Protocol):
    """Sees every batch of one evaluation; what it keeps must not grow with the inputs."""

    def add(self, batch: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401 — a task's output is its own
        """Take in one batch and the task's output for it."""

    def sections(self) -> tuple[Section, ...]:
        """What the task has to say, () where no batch came."""


@dataclass(frozen=True)
class Kept:
    """A sample that was chosen."""

    index: int
    """Place among all samples of the evaluation, from 0."""
    sample: Mapping[str, Any]
    prediction: Mapping[str, Any] | None
    value: float
    """What it was chosen by."""


class Best:
    """Keeps the samples with the largest values, at most one for each group.

    Args:
        count: How many groups.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[Hashable, Kept] = {}

    def wants(self, value: float, group: Hashable) -> bool:
        """Whether a sample of that value would be kept."""
        mine = self._kept.get(group)
        if mine is not None:
            return value > mine.value
        return len(self._kept) < self.count or value > min(kept.value for kept in self._kept.values())

    def add(self, kept: Kept, group: Hashable) -> None:
        """Keep a sample that `wants` accepts; the least one goes."""
        self._kept[group] = kept
        if len(self._kept) > self.count:
            self._kept.pop(min(self._kept, key=lambda key: self._kept[key].value))

    def samples(self) -> list[Kept]:
        """What was kept, largest value first."""
        return heapq.nlargest(self.count, self._kept.values(), key=lambda kept: (kept.value, -kept.index))


def draw(seed: int, index: int) -> float:
    """A number in 0..1 for a sample that depends on nothing but the seed and its place: no batch size, no device."""
    digest = hashlib.blake2b(f"report/{seed}/{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


def batch_size(batch: Mapping[str, Any]) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def element(batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One sample of a batch without the batch axis, its tensors on the CPU."""
    return {name: _element(value, index) for name, value in batch.items()}


def _element(value: Any, index: int) -> Any:  # noqa: ANN401 — whatever a batch holds
    if isinstance(value, Tensor):
        return (value[index] if value.dim() else value).detach().cpu().clone()
    return value[index] if isinstance(value, list | tuple) else value
