"""The bottleneck that Point-PEFT's prompts, MLP branch and geometry-aware adapter share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_modal.methods.convpass import quick_gelu

BIAS_STD = 1e-6


class QuickBottleneck(nn.Module):
    """s U(dropout(q(D z))) with the quick GELU q(z) = z sigmoid(1.702 z); D (hidden, width), U (width, hidden).

    Neither factor starts at zero: Xavier-uniform weights, biases normal with deviation 1e-6, as released.

    Args:
        width: Channels in and out.
        hidden_dim: Channels of the bottleneck.
        dropout: Probability of zeroing a hidden channel.
        scale: s.
    """

    def __init__(
        self, width: int, *, hidden_dim: int, dropout: float = 0.1, scale: float = 1.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, hidden_dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(hidden_dim, width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases."""
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=BIAS_STD)

    def forward(self, z: Tensor) -> Tensor:
        """Z (..., width) to the same shape."""
        out: Tensor = self.up(self.dropout(quick_gelu(self.down(z))))
        return out if self.scale == 1.0 else self.scale * out
