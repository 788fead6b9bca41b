"""Prompts that a tuned model is measured on, beside the untouched one, and what their pictures shall show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Check = Callable[[Tensor], Tensor]
"""From pictures (n, 3, H, W) in 0..1 to a number or truth value for each, (n,)."""


@dataclass(frozen=True)
class Probe:
    """Pictures of some prompts."""

    prompts: tuple[str, ...]
    """One picture is drawn of each, with the seed of its place."""
    checks: Mapping[str, Check] = field(default_factory=dict)
    """Figures by name: the mean over the pictures."""
    is_prior: bool = False
    """Whether they show what the model knew before and shall go on to know."""


@runtime_checkable
class HasProbes(Protocol):
    """Data that knows what a model tuned on it shall show."""

    def probes(self) -> tuple[Probe, ...]:
        """The probes."""


@runtime_checkable
class HasReferences(Protocol):
    """Data that can show what its pictures look like."""

    def references(self, most: int) -> tuple[list[Tensor], list[str]]:
        """Training pictures (3, H, W) in 0..1, as evaluation cuts them, and their captions; at most so many."""


def drift(tuned: Tensor, untouched: Tensor) -> float:
    """How far pictures have moved from the untouched model's: root mean squared difference, mean over pictures.

    Args:
        tuned: (n, 3, H, W) in 0..1.
        untouched: The same prompts and seeds.
    """
    return float((tuned - untouched).square().flatten(1).mean(1).sqrt().mean())


def mean_of(check: Check, pictures: Tensor) -> float:
    """Mean of a check over pictures."""
    return float(check(pictures).to(torch.float32).mean())
