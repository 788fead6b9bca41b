"""Bi-AdaptFormer: AdaptFormer with weights of few bits (Jie et al., ICCV 2023, arXiv:2307.16867)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method, beside_mlp, select_blocks
from peft_modal.methods.bottleneck import must_be_channels_last
from peft_modal.methods.quantised import Bits, QuantisedMatrix
from peft_modal.ranges import DropRate, PositiveInt


class BiAdaptFormer(Method):
    """A bottleneck of 1-bit weights beside the MLP (Jie et al., ICCV 2023, arXiv:2307.16867).

    x2 = x1 + DropPath(MLP(LN x1)) + s * U dropout(ReLU(D x1)) without biases; D and U act through their quantised form,
    see `QuantisedMatrix`. It reads the un-normalised residual stream and lies outside drop-path. The adapter file holds
    `bits` per entry; training is in full precision. U starts near zero, not at zero, since a constant matrix has no
    deviation: a fresh adapter does not compute the pre-trained function.

    Args:
        hidden_dim: Width of the bottleneck.
        bits: Bits per entry.
        scale: s; the paper searches it per task.
        dropout: Probability of zeroing a hidden channel.
        blocks: Blocks to adapt; see `Selector`; None for all.
    """

    identity_at_init = False

    def __init__(
        self, *, hidden_dim: PositiveInt = 32, bits: Bits = 1, scale: float = 1.0, dropout: DropRate = 0.1,
        blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.bits: Bits = bits
        self.scale = scale
        self.dropout = dropout
        self.where = Selector.parse({"blocks": blocks})

    def build(self, adapter: Adapter) -> None:
        """A branch from the residual stream before the MLP's norm to where the MLP's output is added."""
        anatomy = adapter.backbone.anatomy
        for tap in select_blocks(anatomy, self.where, role="mlp.norm.in"):
            must_be_channels_last(tap.channel_dim, tap.name)
            module = QuantisedBottleneck(
                tap.width, self.hidden_dim, bits=self.bits, scale=self.scale, dropout=self.dropout
            )
            adapter.branch(tap, beside_mlp(anatomy, tap), module)


class QuantisedBottleneck(nn.Module):
    """s * U dropout(ReLU(D x)), x (..., width).

    Args:
        width: Channels in and out.
        hidden_dim: Channels between.
        bits: Bits per entry.
        scale: s.
        dropout: Probability of zeroing a hidden channel.
    """

    def __init__(self, width: int, hidden_dim: int, *, bits: Bits, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.down = QuantisedMatrix(hidden_dim, width, bits)
        self.up = QuantisedMatrix(width, hidden_dim, bits)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D as a linear's default; U normal with deviation 1e-3, cut at two of them."""
        draw_factors(self.down, self.up)

    def forward(self, x: Tensor) -> Tensor:
        """The branch, of the input's shape."""
        down, up = self.down().to(x.dtype), self.up().to(x.dtype)
        hidden = functional.dropout(functional.linear(x, down).relu(), self.dropout, training=self.training)
        return self.scale * functional.linear(hidden, up)


def draw_factors(down: QuantisedMatrix, up: QuantisedMatrix) -> None:
    """Initial values of a pair of factors, as released."""
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.trunc_normal_(up.weight, std=1e-3, a=-2e-3, b=2e-3)
