"""Training k chosen entries of a weight with state of size k."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

SavedFor: TypeAlias = Any  # torch's context takes any attribute
Rows: TypeAlias = tuple[int, int] | None
"""First and last row of a slice; None for the whole tensor."""

_INT32_ENTRIES: Final = 2**31


class SparseEntries(nn.Module):
    """k trained entries of one weight slice: absolute values at flat row-major positions of the slice.

    What they do to the weight is their change since they were loaded: `values - loaded` is added to whatever stands
    there, so two adapters on one weight add up. Entries may leave training (`narrow`) and keep the value they have.

    Args:
        weight: The slice as loaded, (out, in, ...).
        index: Flat positions (k,), without duplicates; may be empty.

    Raises:
        ValueError: A position is outside the slice or occurs twice.
    """

    index: Tensor
    """Positions of the trained entries, (k,); int32 where the slice has fewer than 2^31 entries."""
    kept_index: Tensor
    """Positions of entries that were trained before, (m,)."""
    kept_values: Tensor
    """The values that those entries keep, (m,)."""

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        dtype = torch.int32 if weight.numel() < _INT32_ENTRIES else torch.int64
        index = index.flatten().to(weight.device, dtype)
        reason = refuse_positions(index, weight.numel())
        if reason:
            raise ValueError(reason)
        values = entries_at(weight.detach(), index, dtype=value_dtype(weight))
        self.register_buffer("index", index)
        self.register_buffer("kept_index", index.new_zeros(0))
        self.register_buffer("kept_values", values.new_zeros(0))
        self.values = _leaf(values)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever chosen."""
        return not self.values.numel() and not self.kept_values.numel()

    def tuned(self) -> tuple[Tensor, Tensor]:
        """Positions in ascending order and values of all entries that are or were trained."""
        index, order = torch.cat([self.index, self.kept_index]).sort()
        return index, torch.cat([self.values.detach(), self.kept_values]).index_select(0, order)

    def narrow(self, alive: Tensor) -> tuple[nn.Parameter, Tensor]:
        """Train only a part of the entries from now on; the others keep their values.

        Args:
            alive: Which of the trained entries go on, bool (k,).

        Returns:
            The former parameter, and the positions in it of the new one's entries, for
            `ParameterService.replace`.
        """
        former, kept, gone = self.values, alive.nonzero().flatten(), (~alive).nonzero().flatten()
        values = former.detach()
        self.fill(
            index=self.index.index_select(0, kept),
            values=values.index_select(0, kept),
            kept_index=torch.cat([self.kept_index, self.index.index_select(0, gone)]),
            kept_values=torch.cat([self.kept_values, values.index_select(0, gone)]),
        )
        return former, kept

    def widen(self) -> None:
        """Hold all entries as trained ones again, in ascending order."""
        index, values = self.tuned()
        self.fill(index, values, index.new_zeros(0), values.new_zeros(0))

    def fill(self, index: Tensor, values: Tensor, kept_index: Tensor, kept_values: Tensor) -> None:
        """Take over a state of any size; the parameter stays the same one where its size does."""
        like = self.values
        self.index = index.to(like.device, self.index.dtype, copy=True)
        self.kept_index = kept_index.to(like.device, self.index.dtype, copy=True)
        self.kept_values = kept_values.to(like.device, like.dtype, copy=True)
        if values.numel() == like.numel():
            with torch.no_grad():
                like.copy_(values)
        else:
            self.values = _leaf(values.to(like.device, like.dtype, copy=True))


def _leaf(values: Tensor) -> nn.Parameter:
    # An empty leaf takes no part in any forward pass, which distributed training forbids a trained one.
    return nn.Parameter(values, requires_grad=values.numel() > 0)


def value_dtype(weight: Tensor) -> torch.dtype:
    """Type of the trained values of a weight: float32 for a half-precision one."""
    return torch.promote_types(weight.dtype, torch.float32)


def refuse_positions(index: Tensor, count: int) -> str | None:
    """Why these cannot be positions among `count` entries, or None."""
    if not index.numel() or index.is_meta:
        return None
    if int(index.min()) < 0 or int(index.max()) >= count:
        return f"a position is outside the {count} entries of the weight"
    ascending = bool((index[1:] > index[:-1]).all())
    if not ascending and torch.unique(index).numel() != index.numel():
        return "a position is chosen twice"
    return None


def part_of(whole: Tensor, rows: Rows) -> Tensor:
    """A slice of a fused tensor, or the tensor."""
    return whole if rows is None else whole[rows[0] : rows[1]]


def entries_at(weight: Tensor, index: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The entries of a slice at flat positions, (k,)."""
    return weight.flatten().index_select(0, index).to(dtype)


def shifted(under: Tensor, loaded: Tensor, values: Tensor, factor: float) -> Tensor:
    """What stands at the positions once the change of the entries is added; all (k,), in the type of the values.

    Args:
        under: What stands there without them.
        loaded: What stood there as loaded; often the same.
        values: The entries.
        factor: Of the change.
    """
    # In this order training, a loaded file (which holds the change) and a merged weight agree to the bit.
    change = values - loaded
    return under + (change if factor == 1.0 else change * factor)


def write_entries(into: Tensor, index: Tensor, values: Tensor) -> None:
    """Put values at flat positions of a contiguous slice, in place."""
    into.view(-1).index_copy_(0, index.to(torch.int64), values.to(into.dtype))


def _gathered(ctx: SavedFor, grad: Tensor) -> Tensor:
    (index,) = ctx.saved_tensors
    gradient = part_of(grad, ctx.rows).flatten().index_select(0, index).to(ctx.dtype)
    return gradient if ctx.factor == 1.0 else gradient * ctx.factor


class WriteEntries(torch.autograd.Function):
    """A copy of a tensor with the entries written in; backward gathers k gradients and lets the dense one go."""

    @staticmethod
    def forward(
        ctx: SavedFor, below: Tensor, values: Tensor, index: Tensor, loaded: Tensor | None, kept_index: Tensor,
        kept_values: Tensor, rows: Rows, factor: float,
    ) -> Tensor:  # fmt: skip
        """The written tensor; `loaded` is None where it is `below`."""
        ctx.save_for_backward(index)
        ctx.dtype, ctx.rows, ctx.factor = values.dtype, rows, factor
        written = below.clone(memory_format=torch.contiguous_format)
        for where, what in ((index, values), (kept_index, kept_values)):
            under = entries_at(part_of(below, rows), where, dtype=what.dtype)
            start = under if loaded is None else entries_at(part_of(loaded, rows), where, dtype=what.dtype)
            write_entries(part_of(written, rows), where, shifted(under, start, what, factor))
        return written

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of what is below (only where it is itself trained) and of the values."""
        return grad if ctx.needs_input_grad[0] else None, _gathered(ctx, grad), *([None] * 6)


class ReadEntries(torch.autograd.Function):
    """A tensor that holds the entries already; backward as `WriteEntries`."""

    @staticmethod
    def forward(ctx: SavedFor, written: Tensor, values: Tensor, index: Tensor, rows: Rows, factor: float) -> Tensor:
        """The same memory, which autograd takes for a function of `values`."""
        ctx.save_for_backward(index)
        ctx.dtype, ctx.rows, ctx.factor = values.dtype, rows, factor
        return written.detach()

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the values."""
        return None, _gathered(ctx, grad), None, None, None
