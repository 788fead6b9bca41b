"""Low-rank updates: the trainable factors of one weight site."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import WeightSite

LowRankInit = Literal["kaiming", "gaussian"]


class LowRankUpdate(nn.Module):
    """dW = scale * up @ down for a linear; for a convolution `down` has the kernel and `up` is 1x1.

    Shapes: down (rank, in, *kernel), up (out, rank, *1). A subclass that trains something else returns it through
    `factors`.

    Args:
        shape: Logical shape of the weight site.
        rank: Number of rows of `down`.
        scale: Factor of the product.
        dropout: Probability of zeroing an input channel of the update, while training.
        init: `kaiming` draws `down` uniformly with bound 1/sqrt(fan in) (Kaiming, a = sqrt 5); `gaussian` draws it with
            standard deviation 1/rank. `up` starts at zero, so the update starts at zero.
    """

    def __init__(
        self, shape: tuple[int, ...], *, rank: int, scale: float = 1.0, dropout: float = 0.0,
        init: LowRankInit = "kaiming",
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = shape[2:]
        self.scale = scale
        self.dropout = dropout
        self.init = init
        self.down = nn.Parameter(torch.empty(rank, *shape[1:]))
        self.up = nn.Parameter(torch.empty(shape[0], rank, *(1 for _ in kernel)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `down`, zero `up`."""
        if self.init == "kaiming":
            bound = 1.0 / math.sqrt(max(1, math.prod(self.down.shape[1:])))
            nn.init.uniform_(self.down, -bound, bound)
        else:
            nn.init.normal_(self.down, std=1.0 / self.down.shape[0])
        nn.init.zeros_(self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The pair (down, up) that the forward pass uses."""
        return self.down, self.up

    @property
    def drops(self) -> bool:
        """Whether dropout acts at the moment."""
        return self.training and self.dropout > 0

    def drop(self, x: Tensor) -> Tensor:
        """The input after dropout."""
        return functional.dropout(x, self.dropout, training=self.training) if self.dropout else x

    def delta(self) -> Tensor:
        """The weight change, of the site's logical shape."""
        down, up = self.factors()
        return self.scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def can_update(site: WeightSite, *, groups: int) -> str | None:
    """Why a low-rank update cannot act on a site, or None."""
    if site.op not in {"linear", "conv"}:
        return f"its operation is '{site.op}'; low-rank updates act on linears and convolutions"
    if groups != 1:
        return f"it is a convolution with {groups} groups; a low-rank update of a grouped convolution is not defined"
    return None
