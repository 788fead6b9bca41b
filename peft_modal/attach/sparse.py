"""Training k chosen entries of a weight with state of size k."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

SavedFor: TypeAlias = Any  # torch's context takes any attribute


class WriteEntries(torch.autograd.Function):
    """W with `values` written at flat positions `index`; backward gathers k gradients and lets the dense one go."""

    @staticmethod
    def forward(ctx: SavedFor, base: Tensor, values: Tensor, index: Tensor) -> Tensor:
        """The written weight, of the shape of `base`."""
        ctx.save_for_backward(index)
        ctx.values_dtype = values.dtype
        return base.flatten().index_copy(0, index, values.to(base.dtype)).view_as(base)

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Gradient of the base (only where it is itself computed from something trained) and of the values."""
        (index,) = ctx.saved_tensors
        flat = grad.flatten()
        grad_values = flat.index_select(0, index).to(ctx.values_dtype)
        grad_base = flat.index_fill(0, index, 0.0).view_as(grad) if ctx.needs_input_grad[0] else None
        return grad_base, grad_values, None


class SparseEntries(nn.Module):
    """k trained entries of one weight slice: absolute values at flat positions of the slice.

    Args:
        weight: The slice as loaded, (out, in, ...).
        index: Flat positions, int64 (k,), without duplicates; may be empty.

    Raises:
        ValueError: A position is outside the slice or occurs twice.
    """

    index: Tensor

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        index = index.to(torch.int64).flatten()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= weight.numel()):
            raise ValueError(f"a position is outside the {weight.numel()} entries of the weight")
        if torch.unique(index).numel() != index.numel():
            raise ValueError("a position is chosen twice")
        self.register_buffer("index", index)
        self.values = nn.Parameter(weight.detach().flatten().index_select(0, index.to(weight.device)).clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the trained values written in."""
        if torch.is_autocast_enabled(weight.device.type):
            # Written in full precision; the operation casts the result itself.
            with torch.autocast(weight.device.type, enabled=False):
                return WriteEntries.apply(weight, self.values, self.index)
        return WriteEntries.apply(weight, self.values, self.index)

    def resize(self, count: int) -> None:
        """Make room for `count` entries, before a state of that size is loaded."""
        if count != self.values.numel():
            self.values = nn.Parameter(self.values.new_zeros(count))
            self.index = self.index.new_zeros(count)
