"""The fused low-rank linear: forward and backward of all slices of one weight in one autograd function.

The rank is the row count of every small product (`down @ x.T`, `up.T @ g.T`), which BLAS computes several times faster
on a CPU than the same products the other way round. The small products come first and carry the bias, and the large one
is added to them in place: no pass over (tokens x width) memory is made for the update alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

SavedFor: TypeAlias = Any  # torch's context takes any attribute
Argument: TypeAlias = Any  # tensors, None for a missing bias, and the tuple of slices


class LowRankLinear(torch.autograd.Function):
    """y = W x + b, and y[rows_k] += scale_k * up_k down_k x for every update k.

    Shapes: x (..., in), weight (out, in), bias (out), each down (r_k, in), each up (rows_k, r_k); y (..., out).
    """

    @staticmethod
    def forward(ctx: SavedFor, x: Tensor, *rest: Argument) -> Tensor:
        """Compute y.

        `rest` is weight, bias, `slices` of (first row, last row, scale), and in their order all downs, then all ups.
        """
        # Not declared one by one: without gradients torch.compile drops `ctx` from a call with as many arguments as
        # forward declares, which one pair of factors would be.
        weight, bias, slices, *factors = rest
        downs, ups = factors[: len(slices)], factors[len(slices) :]
        flat = x.reshape(-1, x.shape[-1])
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        hidden = down @ flat.T
        y = flat.new_empty(flat.shape[0], weight.shape[0])
        updates = _updates(slices, ups, hidden)
        fresh, overlapping = _split_overlapping(updates)
        for first, last in _gaps(fresh, weight.shape[0]):
            y[:, first:last] = 0.0 if bias is None else bias[first:last]
        for first, last, left, right in fresh:
            if bias is not None:
                left = torch.cat([left, left.new_ones(1, left.shape[1])])  # noqa: PLW2901 — one more rank
                right = torch.cat([right, bias[None, first:last]])  # noqa: PLW2901
            y[:, first:last].addmm_(left.T, right, beta=0)
        for first, last, left, right in overlapping:
            y[:, first:last].addmm_(left.T, right)
        y.addmm_(flat, weight.T)
        ctx.save_for_backward(flat, weight, down, hidden, *ups)
        ctx.slices, ctx.shape, ctx.has_bias = slices, x.shape, bias is not None
        ctx.ranks = [d.shape[0] for d in downs]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias (None where not asked for), and of the factors."""
        flat, weight, down, hidden, *ups = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        spread, up_grads, rank = [], [], 0
        for (first, last, scale), up in zip(ctx.slices, ups, strict=True):
            rows = g[:, first:last]
            spread.append((up.T @ rows.T) * scale)
            part = hidden[rank : rank + up.shape[1]]
            up_grads.append(((part @ rows) * scale).T.contiguous())
            rank += up.shape[1]
        t = spread[0] if len(spread) == 1 else torch.cat(spread)
        down_grads = (t @ flat).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (t.T @ down).addmm_(g, weight).view(ctx.shape)
        grad_weight = g.T @ flat if ctx.needs_input_grad[1] else None
        grad_bias = g.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, *down_grads, *up_grads


_Update: TypeAlias = tuple[int, int, Tensor, Tensor]
"""First row, last row, hidden (rank, tokens), scaled up transposed (rank, rows)."""


def _updates(slices: Sequence[tuple[int, int, float]], ups: Sequence[Tensor], hidden: Tensor) -> list[_Update]:
    parts = torch.split(hidden, [up.shape[1] for up in ups])
    return [
        (first, last, part, up.T if scale == 1 else up.T * scale)
        for (first, last, scale), up, part in zip(slices, ups, parts, strict=True)
    ]


def _split_overlapping(updates: Sequence[_Update]) -> tuple[list[_Update], list[_Update]]:
    """Updates of rows that no earlier one writes, by row, and the others."""
    fresh: list[_Update] = []
    overlapping: list[_Update] = []
    for update in updates:
        disjoint = all(update[1] <= other[0] or other[1] <= update[0] for other in fresh)
        (fresh if disjoint else overlapping).append(update)
    return sorted(fresh, key=lambda update: update[0]), overlapping


def _gaps(updates: Sequence[_Update], rows: int) -> list[tuple[int, int]]:
    """Ranges of rows that no update writes; `updates` are sorted and disjoint."""
    edges = [0, *(edge for first, last, *_ in updates for edge in (first, last)), rows]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
