"""The bottleneck that Houlsby, Pfeiffer and AdaptFormer adapters share."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from peft_modal.errors import AttachError

Activation = Literal["gelu", "relu", "silu"]
BottleneckInit = Literal["zero_up", "normal"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class Bottleneck(nn.Module):
    """U(dropout(activation(D x))) with D (hidden, width) and U (width, hidden), both with bias.

    Args:
        width: Channels in and out.
        hidden_dim: Channels of the bottleneck.
        activation: Nonlinearity.
        dropout: Probability of zeroing a hidden channel.
        scale: Factor of the output, or `learned` for a trained scalar that starts at 1.
        norm: LayerNorm (eps 1e-5) before D (`in`), after the scale (`out`), or none.
        init: `zero_up` starts D Kaiming uniform with a = sqrt 5, and U at zero: one factor is non-zero, so both learn.
            `normal` draws both with standard deviation 0.02.
    """

    def __init__(
        self, width: int, *, hidden_dim: int, activation: Activation = "gelu", dropout: float = 0.0,
        scale: float | Literal["learned"] = 1.0, norm: Literal["none", "in", "out"] = "none",
        init: BottleneckInit = "zero_up",
    ) -> None:  # fmt: skip
        super().__init__()
        self.init: BottleneckInit = init
        self.before = nn.LayerNorm(width, eps=1e-5) if norm == "in" else nn.Identity()
        self.down = nn.Linear(width, hidden_dim)
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(hidden_dim, width)
        self.scale = LearnedScale() if scale == "learned" else FixedScale(scale)
        self.after = nn.LayerNorm(width, eps=1e-5) if norm == "out" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights as `init` says, the biases zero."""
        if self.init == "normal":
            nn.init.normal_(self.down.weight, std=0.02)
            nn.init.normal_(self.up.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., width) to the same shape."""
        return self.after(self.scale(self.up(self.dropout(self.activation(self.down(self.before(x)))))))


class FixedScale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """X times the constant."""
        return x * self.value


class LearnedScale(nn.Module):
    """Multiplies by a trained scalar that starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """X times the scalar."""
        return x * self.value


def must_be_channels_last(channel_dim: int, port: str) -> None:
    """Refuse a port whose last axis is not the channel.

    Raises:
        AttachError: It is not.
    """
    if channel_dim != -1:
        raise AttachError(f"'{port}' has its channels on axis {channel_dim}; a bottleneck of linears needs them last")
