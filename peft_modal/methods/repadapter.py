"""RepAdapter: bottlenecks that fold into the linear behind them (Luo et al., 2023, arXiv:2302.08106)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter, LifeCycle
from peft_modal.attach.lifecycle import Batch, Output
from peft_modal.attach.operations import Operation
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.grouped import block_diagonal
from peft_modal.ranges import DropRate, NonNegativeFloat, PositiveInt

INPUTS = ("attn.qkv", "attn.q", "attn.k", "attn.v", "mlp.in", "mlp.gate")
"""What reads the output of a block's norms."""


class RepAdapter(Method):
    """A linear bottleneck before attention and before the MLP (Luo et al., 2023, arXiv:2302.08106).

    Attn(R(LN x)) and MLP(R(LN x)) with R(z) = z + s * (U dropout(D z + b_D) + b_U); D (hidden, C) is dense and U
    (C, hidden) grouped. Without an activation it folds into the linear that reads it: W' = W T, b' = b + W t with
    T = I + s U D and t = s (U b_D + b_U). Where q, k and v are linears of their own they share one R, each with a
    dropout of its own.

    Args:
        sites: Linears to stand before; see `Selector`. A fused q, k and v is taken whole.
        hidden_dim: Width of the bottleneck.
        groups: Groups of U.
        scale: s; the paper searches it per task.
        dropout: Probability of zeroing a hidden channel.
        norm_penalty: Factor of the norms of U and of its bias, which the released training loop of later dates adds to
            the loss with a factor of 1.

    Raises:
        ConfigError: `groups` does not divide `hidden_dim`.
    """

    identity_at_init = True

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = list(INPUTS),  # noqa: B006 — never changed
        hidden_dim: PositiveInt = 8, groups: PositiveInt = 2, scale: float = 1.0, dropout: DropRate = 0.1,
        norm_penalty: NonNegativeFloat = 0.0,
    ) -> None:  # fmt: skip
        if hidden_dim % groups:
            raise ConfigError(f"method.groups: {groups} does not divide method.hidden_dim, {hidden_dim}")
        self.sites = Selector.parse(sites)
        self.hidden_dim = hidden_dim
        self.groups = groups
        self.scale = scale
        self.dropout = dropout
        self.norm_penalty = norm_penalty

    def build(self, adapter: Adapter) -> None:
        """One bottleneck for all that read the same norm of a block.

        Raises:
            AttachError: A site is no linear, or the groups do not divide its width.
        """
        shared: dict[tuple[str, int | None, str], Bottleneck] = {}
        anatomy = adapter.backbone.anatomy
        for site in anatomy.select(self.sites, needs=("call", "weight"), fused=True):
            if site.op != "linear" or site.rows is not None:
                raise AttachError(f"'{site.name}' is no whole linear; a bottleneck stands before whole linears only")
            width = site.shape[1]
            if width % self.groups:
                raise AttachError(f"method.groups: {self.groups} does not divide {width}, the width of '{site.name}'")
            key = (site.stack, site.block, site.role.rpartition(".")[0])
            if key not in shared:
                shared[key] = Bottleneck(width, self.hidden_dim, self.groups, scale=self.scale, dropout=self.dropout)
            adapter.operate(site, BeforeLinear(shared[key]))
        if self.norm_penalty:
            penalty = NormPenalty(list(shared.values()), self.norm_penalty)
            adapter.listen(penalty, name="repadapter", training_only=True)


class Bottleneck(nn.Module):
    """R(z) = z + s * (U dropout(D z)), z (..., width).

    Args:
        width: Channels in and out.
        hidden_dim: Channels between.
        groups: Of U, whose weight is (width, hidden_dim / groups).
        scale: s.
        dropout: Probability of zeroing a hidden channel.
    """

    def __init__(self, width: int, hidden_dim: int, groups: int, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.groups = groups
        self.down = nn.Linear(width, hidden_dim)
        self.up = nn.Linear(hidden_dim // groups, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D Xavier uniform, U and the biases zero."""
        nn.init.xavier_uniform_(self.down.weight)
        for zeroed in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zeroed)

    def forward(self, z: Tensor) -> Tensor:
        """R(z), of the same shape."""
        hidden = functional.dropout(self.down(z), self.dropout, training=self.training)
        return z + self.scale * functional.linear(hidden, self.dense_up(), self.up.bias)

    def dense_up(self) -> Tensor:
        """U as a plain matrix (width, hidden): its groups on the diagonal."""
        return block_diagonal(*self.up.weight.chunk(self.groups))

    def matrix(self) -> Tensor:
        """T (width, width)."""
        product = self.scale * (self.dense_up() @ self.down.weight)
        return torch.eye(len(product), dtype=product.dtype, device=product.device) + product

    def shift(self) -> Tensor:
        """The constant t (width)."""
        return self.scale * (self.dense_up() @ self.down.bias + self.up.bias)


class BeforeLinear(Operation):
    """W R(x) + b.

    Args:
        bottleneck: R.
    """

    changes_bias = True

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.has_dropout = bottleneck.dropout > 0

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear of the bottleneck's output."""
        return functional.linear(self.bottleneck(x).to(x.dtype), weight, bias)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """The product W T."""
        return weight @ self.bottleneck.matrix().to(weight.dtype)

    def fold_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The sum b + W t."""
        added = weight @ self.bottleneck.shift().to(weight.dtype)
        return added if bias is None else bias + added


class NormPenalty(LifeCycle):
    """Factor times the norms of all U and their biases.

    Args:
        bottlenecks: Whose.
        factor: Of the sum.
    """

    def __init__(self, bottlenecks: list[Bottleneck], factor: float) -> None:
        super().__init__()
        self.__dict__["bottlenecks"] = bottlenecks  # owned by their sites
        self.factor = factor

    @override
    def penalty(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        del batch, output
        norms = [tensor.norm() for module in self._own for tensor in (module.up.weight, module.up.bias)]
        return {"norm_penalty": self.factor * torch.stack(norms).sum()}

    @property
    def _own(self) -> list[Bottleneck]:
        return self.__dict__["bottlenecks"]
