"""Convpass: convolutional bypasses (Jie and Deng, 2022, arXiv:2207.07039)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Context, Port, Selector, TokenLayout
from peft_modal.attach import Adapter
from peft_modal.attach.updates import drop_samples
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method, select_blocks
from peft_modal.methods.bottleneck import must_be_channels_last
from peft_modal.ranges import DropRate, PositiveInt

Places = Literal["both", "attention", "mlp"]
ConvInit = Literal["identity", "xavier"]


class Convpass(Method):
    """A convolutional bottleneck beside attention and beside the MLP (Jie and Deng, 2022, arXiv:2207.07039).

    x1 = x + DP(Attn(LN x)) + s * DP(c(LN x)), and x2 of x1 with the MLP likewise; c(z) = U dropout(q(conv(q(D z))))
    with the quick GELU q(z) = z sigmoid(1.702 z) and a 3x3 convolution over the grid of the patches. Every other token
    (class token, registers, prompts) passes the same convolution as a picture of one pixel.

    Args:
        hidden_dim: Width of the bottleneck.
        scale: s; the paper searches it per task.
        places: Beside which half of a block.
        conv_init: The convolution starts as the identity, or Xavier uniform; the released code has both, per task.
        dropout: Probability of zeroing a hidden channel.
        drop_path: Probability of leaving a sample's bypass out.
        blocks: Blocks to adapt; see `Selector`; None for all.
    """

    identity_at_init = True

    def __init__(
        self, *, hidden_dim: PositiveInt = 8, scale: float = 0.1, places: Places = "both",
        conv_init: ConvInit = "identity", dropout: DropRate = 0.1, drop_path: DropRate = 0.0,
        blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.scale = scale
        self.places: Places = places
        self.conv_init: ConvInit = conv_init
        self.dropout = dropout
        self.drop_path = drop_path
        self.where = Selector.parse({"blocks": blocks})

    def build(self, adapter: Adapter) -> None:
        """A branch from each norm to where its half of the block adds to the stream.

        Raises:
            AttachError: There is no stack of blocks over a grid of patches.
        """
        anatomy = adapter.backbone.anatomy
        halves = {"both": ("attn", "mlp"), "attention": ("attn",), "mlp": ("mlp",)}[self.places]
        taps = [tap for half in halves for tap in select_blocks(anatomy, self.where, role=f"{half}.norm.out")]
        on_grid = [tap for tap in taps if tap.stack in anatomy.layouts and _is_grid(anatomy.layouts[tap.stack])]
        if not on_grid:
            raise AttachError("none of its blocks works on a grid of patches, over which a convolution could go")
        for tap in on_grid:
            must_be_channels_last(tap.channel_dim, tap.name)
            inject = anatomy.port(f"{tap.role.partition('.')[0]}.branch", stack=tap.stack, block=tap.block)
            module = ConvBypass(
                tap, anatomy.layouts[tap.stack], hidden_dim=self.hidden_dim, scale=self.scale, dropout=self.dropout,
                drop_path=self.drop_path, conv_init=self.conv_init,
            )  # fmt: skip
            adapter.branch(tap, inject, module)


def _is_grid(layout: TokenLayout) -> bool:
    return layout.body in {"grid", "windows"}


class ConvBypass(nn.Module):
    """s * c(z) for tokens (B, N, C), or (B, H, W, C).

    The grid is what the backbone puts into the context as `grid` (or `grid.<stack>.<block>` where it changes with
    depth); without, the patches are taken for a square.

    Args:
        tap: Where it reads.
        layout: Which tokens lie there.
        hidden_dim: Width of the bottleneck.
        scale: s.
        dropout: Probability of zeroing a hidden channel.
        drop_path: Probability of leaving a sample out.
        conv_init: See `Convpass`.
    """

    uses_context = True

    def __init__(
        self, tap: Port, layout: TokenLayout, *, hidden_dim: int, scale: float, dropout: float, drop_path: float,
        conv_init: ConvInit,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tap = tap
        self.layout = layout
        self.scale = scale
        self.drop_path = drop_path
        self.conv_init: ConvInit = conv_init
        self.down = nn.Linear(tap.width, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(hidden_dim, tap.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D Xavier uniform, U and the biases zero, the convolution as `conv_init` says."""
        nn.init.xavier_uniform_(self.down.weight)
        if self.conv_init == "xavier":
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.zeros_(self.conv.weight)
            with torch.no_grad():
                self.conv.weight[:, :, 1, 1] = torch.eye(len(self.conv.weight))
        for zeroed in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            assert zeroed is not None
            nn.init.zeros_(zeroed)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """The branch, of the input's shape."""
        hidden = quick_gelu(self.down(z))
        if hidden.dim() == 4:
            convolved = self.conv(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            convolved = self._tokens(hidden, context)
        y = self.scale * self.up(self.dropout(quick_gelu(convolved)))
        return drop_samples(y, self.drop_path) if self.training and self.drop_path else y

    def _tokens(self, hidden: Tensor, context: Context) -> Tensor:
        count = hidden.shape[1]
        data = context.data_tokens(self.tap, self.layout, count)
        patches = hidden[:, data]
        height, width = self._grid(context, patches.shape[1])
        picture = patches.transpose(1, 2).reshape(len(patches), -1, height, width)
        over_grid = self.conv(picture).flatten(2).transpose(1, 2)
        # The middle tap alone: what a picture of one pixel sees of the convolution.
        weight = self.conv.weight[:, :, 1, 1].to(hidden.dtype)
        assert self.conv.bias is not None
        before, after = (
            nn.functional.linear(part, weight, self.conv.bias.to(hidden.dtype))
            for part in (hidden[:, : data.start], hidden[:, data.stop :])
        )
        return torch.cat([before.to(over_grid.dtype), over_grid, after.to(over_grid.dtype)], dim=1)

    def _grid(self, context: Context, count: int) -> tuple[int, int]:
        for key in (f"grid.{self.tap.stack}.{self.tap.block}", "grid"):
            if context.has(key):
                height, width = context.get(key)
                if height * width == count:
                    return height, width
        side = math.isqrt(count)
        if side * side != count:
            raise AttachError(
                f"'{self.tap.name}': {count} patches are no square, and the backbone tells no grid of them"
            )
        return side, side


def quick_gelu(z: Tensor) -> Tensor:
    """Z sigmoid(1.702 z)."""
    return z * torch.sigmoid(1.702 * z)
