"""Low-rank updates: the trainable factors of one weight site."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import WeightSite

LowRankInit = Literal["kaiming", "gaussian", "trunc_normal"]


class LowRankUpdate(nn.Module):
    """dW = scale * up @ down for a linear; for a convolution `down` has the kernel and `up` is 1x1.

    Shapes: down (rank, in, *kernel), up (out, rank, *1). A subclass that trains something else returns it through
    `factors`.

    Args:
        shape: Logical shape of the weight site.
        rank: Number of rows of `down`.
        scale: Factor of the product.
        dropout: Probability of zeroing an input channel of the update, while training.
        hidden_dropout: Probability of zeroing a channel between the two factors, likewise.
        drop_path: Probability of leaving a sample's update out, likewise.
        init: `kaiming` draws `down` uniformly with bound 1/sqrt(fan in) (Kaiming, a = sqrt 5); `gaussian` draws it with
            standard deviation 1/rank. `up` starts at zero, so the update starts at zero; with `trunc_normal` both are
            normal with standard deviation 0.02, and it does not.
    """

    down: Any  # a parameter, or what a subclass makes it of
    up: Any

    def __init__(
        self, shape: tuple[int, ...], *, rank: int, scale: float = 1.0, dropout: float = 0.0,
        hidden_dropout: float = 0.0, drop_path: float = 0.0, init: LowRankInit = "kaiming",
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = shape[2:]
        self.scale = scale
        self.dropout = dropout
        self.hidden_dropout = hidden_dropout
        self.drop_path = drop_path
        self.init = init
        self.make_factors((rank, *shape[1:]), (shape[0], rank, *(1 for _ in kernel)))
        self.reset_parameters()

    def make_factors(self, down: tuple[int, ...], up: tuple[int, ...]) -> None:
        """Make the parameters; a subclass that trains something else makes that instead.

        Args:
            down: Shape of the first factor.
            up: Shape of the second.
        """
        self.down = nn.Parameter(torch.empty(down))
        self.up = nn.Parameter(torch.empty(up))

    def reset_parameters(self) -> None:
        """Draw `down`, zero `up`."""
        if self.init == "trunc_normal":
            for factor in (self.down, self.up):
                nn.init.trunc_normal_(factor, std=0.02)
            return
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
        return self.training and max(self.dropout, self.hidden_dropout, self.drop_path) > 0

    def drop(self, x: Tensor) -> Tensor:
        """The input after dropout."""
        return functional.dropout(x, self.dropout, training=self.training) if self.dropout else x

    def drop_samples(self, added: Tensor) -> Tensor:
        """What is added to the output, but for the samples that are left out."""
        return drop_samples(added, self.drop_path) if self.training and self.drop_path else added

    def drop_hidden(self, hidden: Tensor) -> Tensor:
        """What lies between the factors after dropout."""
        p = self.hidden_dropout
        return functional.dropout(hidden, p, training=self.training) if p else hidden

    def delta(self) -> Tensor:
        """The weight change, of the site's logical shape."""
        down, up = self.factors()
        return self.scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def drop_samples(added: Tensor, probability: float) -> Tensor:
    """A residual branch (B, ...) without a random part of its samples, the others scaled up (drop-path)."""
    keep = 1.0 - probability
    mask = torch.rand(len(added), *(1 for _ in added.shape[1:]), device=added.device) < keep
    return added * mask / keep


def can_update(site: WeightSite, *, groups: int) -> str | None:
    """Why a low-rank update cannot act on a site, or None."""
    if site.op not in {"linear", "conv"}:
        return f"its operation is '{site.op}'; low-rank updates act on linears and convolutions"
    if groups != 1:
        return f"it is a convolution with {groups} groups; a low-rank update of a grouped convolution is not defined"
    return None
