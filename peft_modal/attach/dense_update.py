"""Updates that are made as a dense matrix in each pass and never kept: x @ M(theta), M computed again in backward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.attach.updates import drop_samples

SavedFor: TypeAlias = Any  # torch's context takes any attribute
Make: TypeAlias = Callable[..., Tensor]


class DenseUpdate(nn.Module):
    """A weight change that its parameters generate; beside a call it adds DropPath(dropout(x) M) to the output.

    Of one site's forward and backward only x and the parameters outlive the call.

    Args:
        dropout: Probability of zeroing an input channel, while training; updates of one call that have the same share
            one draw.
        drop_path: Probability of leaving a sample out, while training.
    """

    hidden_dropout: float = 0.0

    def __init__(self, *, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.drop_path = drop_path

    @abstractmethod
    def generators(self) -> tuple[Tensor, ...]:
        """The tensors that `generate` takes."""

    @abstractmethod
    def generate(self, *tensors: Tensor) -> Tensor:
        """The matrix M (in, out) of these tensors, differentiable."""

    def delta(self) -> Tensor:
        """The weight change (out, in)."""
        return self.generate(*self.generators()).T

    def branch(self, x: Tensor, dropped: dict[float, Tensor]) -> Tensor:
        """What is added to the output for an input (..., in).

        Args:
            x: The input.
            dropped: Inputs after dropout that another update of this call has drawn, by probability.
        """
        p = self.dropout if self.training else 0.0
        if p and p not in dropped:
            dropped[p] = functional.dropout(x, p)
        y = cast("Tensor", _Generated.apply(dropped[p] if p else x, self.generate, *self.generators()))
        return drop_samples(y, self.drop_path) if self.training and self.drop_path else y


class _Generated(torch.autograd.Function):
    """The product x @ make(*tensors)."""

    @staticmethod
    def forward(ctx: SavedFor, x: Tensor, make: Make, *tensors: Tensor) -> Tensor:
        """The product in the type of x."""
        ctx.save_for_backward(x, *tensors)
        ctx.make = make
        return x @ make(*tensors).to(x.dtype)

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the tensors, through the matrix computed again."""
        x, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, wanted, strict=True)]
            matrix = ctx.make(*leaves)
        grad_x = grad @ matrix.detach().to(grad.dtype).T if ctx.needs_input_grad[0] else None
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        found: dict[int, Tensor] = {}
        if chosen:
            flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            into = (flat_x.T @ flat_grad.to(flat_x.dtype)).to(matrix.dtype)
            gradients = torch.autograd.grad(matrix, chosen, into, allow_unused=True)
            found = {id(leaf): g for leaf, g in zip(chosen, gradients, strict=True) if g is not None}
        return grad_x, None, *(found.get(id(leaf)) for leaf in leaves)
