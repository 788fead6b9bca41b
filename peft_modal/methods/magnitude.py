"""Order statistics of magnitudes over many tensors, without sorting or joining them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

_BITS: Final = 16
"""Half of a float32: two histograms of 2^16 bins find any of its values."""


def magnitude(tensor: Tensor) -> Tensor:
    """Absolute values in float32, whatever the tensor is stored as."""
    return tensor.detach().to(torch.float32).abs()


def magnitude_at(tensors: Sequence[Tensor], rank: int) -> float:
    """The magnitude with exactly `rank` others before it, were all entries of all tensors sorted.

    Non-negative floats are ordered as the integers with the same bits, so a histogram of the upper halves finds the bin
    and one of the lower halves in it the value. Only one tensor's magnitudes exist at a time.

    Args:
        tensors: Of any shapes and types.
        rank: From 0 to the number of entries less one.
    """
    upper, rank = _bin_of(((_bits(tensor) >> _BITS) for tensor in tensors), rank)
    lower, _ = _bin_of(
        (bits[(bits >> _BITS) == upper] & ((1 << _BITS) - 1) for bits in (_bits(tensor) for tensor in tensors)), rank
    )
    return float(torch.tensor((upper << _BITS) | lower, dtype=torch.int32).view(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    return magnitude(tensor).flatten().view(torch.int32)


def _bin_of(parts: Iterable[Tensor], rank: int) -> tuple[int, int]:
    """The bin that holds the entry of that rank, and its rank inside."""
    counts = torch.zeros(1 << _BITS, dtype=torch.int64)
    for part in parts:
        counts += torch.bincount(part, minlength=1 << _BITS).cpu()
    before = counts.cumsum(0)
    found = int(torch.searchsorted(before, rank, right=True))
    return found, rank - (int(before[found - 1]) if found else 0)
