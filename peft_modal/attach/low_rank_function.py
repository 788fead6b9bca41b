"""The fused low-rank linear: forward and backward of all slices of one weight in one autograd function.

The rank is the row count of every small product (`down @ x.T`, `up.T @ g.T`), which BLAS computes several times faster
on a CPU than the same products the other way round, and outputs are updated in place.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

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
        y = functional.linear(flat, weight, bias)
        rank = 0
        for (first, last, scale), up in zip(slices, ups, strict=True):
            y[:, first:last].addmm_(hidden[rank : rank + up.shape[1]].T, up.T, alpha=scale)
            rank += up.shape[1]
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
            grad_x = g @ weight
            grad_x.addmm_(t.T, down)
            grad_x = grad_x.view(ctx.shape)
        grad_weight = g.T @ flat if ctx.needs_input_grad[1] else None
        grad_bias = g.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, *down_grads, *up_grads
