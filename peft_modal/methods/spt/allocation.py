"""Which tensors are tuned how: the sweep over numbers of most sensitive entries (He et al., ICCV 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

Kind = Literal["matrix", "vector"]
SWEEP: Final = 79
"""Points of the sweep."""
STEP: Final = 0.02
"""Of the sweep, in units: the i-th point looks at the 0.02 i most sensitive units of entries."""


@dataclass(frozen=True)
class Target:
    """A tensor, or a slice of a fused one, that can be tuned."""

    name: str
    kind: Kind
    size: int
    """Entries."""
    cost: int = 0
    """Entries of a module beside a matrix."""


@dataclass(frozen=True)
class Allocation:
    """What is tuned how; tensors that are not named are not tuned."""

    structured: tuple[str, ...]
    """Matrices that get a module."""
    vectors: tuple[str, ...]
    """Vectors that are tuned whole."""
    entries: Mapping[str, Tensor] = field(default_factory=dict)
    """Flat positions of single entries that are tuned, ascending, by tensor in order."""
    total: float = 0.0
    """Entries that are tuned, in units."""

    def positions(self, targets: Sequence[Target]) -> Tensor:
        """The single entries in the concatenation of all tensors that are tuned in no other way, as in a record."""
        first, found = 0, [torch.zeros(0, dtype=torch.int64)]
        for target in targets:
            if target.name not in {*self.structured, *self.vectors}:
                found.append(first + self.entries.get(target.name, found[0]))
                first += target.size
        return torch.cat(found)


def allocate(
    targets: Sequence[Target],
    sensitivities: Mapping[str, Tensor],
    budgets: Sequence[float],
    *,
    unit: float,
    alpha: float,
    beta: float,
    overhead: int,
    structured_only: bool = False,
) -> list[Allocation]:
    """The allocation that comes nearest to each budget.

    Of the k most sensitive entries of all targets together n lie in a target. A vector with n >= size / beta is tuned
    whole, a matrix with n >= cost / alpha gets its module and its entries are dropped; else the n entries are tuned. k
    itself is not the budget: what is tuned in the end costs more or less.

    Args:
        targets: In order.
        sensitivities: Of each target by name, of its size.
        budgets: In units.
        unit: Entries of one unit; the paper's is 1e6.
        alpha: How easily a matrix gets a module.
        beta: How easily a vector is tuned whole.
        overhead: Entries that are tuned in any case (the class token).
        structured_only: Tune no single entries.
    """
    flat = torch.cat([sensitivities[target.name].flatten() for target in targets])
    order = flat.argsort(descending=True, stable=True)
    owner = torch.repeat_interleave(torch.arange(len(targets)), torch.tensor([target.size for target in targets]))
    ranked = owner[order.cpu()]
    best: list[tuple[float, float, int]] = [(abs(0.0 - budget), 0.0, 0) for budget in budgets]
    for i in range(1, SWEEP + 1):
        k = min(math.ceil(STEP * i * unit), len(flat))
        counts = torch.bincount(ranked[:k], minlength=len(targets)).tolist()
        cost = sum(
            _choice(target, n, alpha=alpha, beta=beta, structured_only=structured_only)[1]
            for target, n in zip(targets, counts, strict=True)
        )
        total = (cost + overhead) / unit
        for number, budget in enumerate(budgets):
            # Later points win ties.
            if abs(total - budget) <= best[number][0]:
                best[number] = abs(total - budget), total, k
    return [
        _at(targets, order[:k].cpu(), ranked[:k], total, alpha=alpha, beta=beta, structured_only=structured_only)
        for _, total, k in best
    ]


Choice = Literal["structured", "whole", "entries", "nothing"]


def _choice(target: Target, n: int, *, alpha: float, beta: float, structured_only: bool) -> tuple[Choice, int]:
    """How a target with n sensitive entries is tuned, and what that costs."""
    if target.kind == "vector" and n >= target.size / beta:
        return "whole", target.size
    if target.kind == "matrix" and n >= target.cost / alpha:
        return "structured", target.cost
    return ("nothing", 0) if structured_only or not n else ("entries", n)


def _at(
    targets: Sequence[Target],
    chosen: Tensor,
    owner: Tensor,
    total: float,
    *,
    alpha: float,
    beta: float,
    structured_only: bool,
) -> Allocation:
    """The allocation of the entries at flat positions `chosen`, which lie in the targets `owner`."""
    first = 0
    structured, vectors, entries = [], [], {}
    for number, target in enumerate(targets):
        own = chosen[owner == number]
        choice, _ = _choice(target, len(own), alpha=alpha, beta=beta, structured_only=structured_only)
        if choice == "structured":
            structured.append(target.name)
        elif choice == "whole":
            vectors.append(target.name)
        elif choice == "entries":
            entries[target.name] = (own - first).sort().values
        first += target.size
    return Allocation(tuple(structured), tuple(vectors), entries, total)
