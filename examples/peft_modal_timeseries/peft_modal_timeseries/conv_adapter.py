"""A convolutional adapter along time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Context, Port, Selector, TokenLayout
from peft_modal.attach import Adapter
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods import Method, select_blocks


class ConvAdapter(Method):
    """A bottleneck parallel to the MLP with a depthwise convolution along time, for each channel alone.

    x2 = x1 + MLP(LN x1) + s * U act(h + K * h) with h = D LN(x1), where K * h convolves every hidden channel over
    neighbouring patches of the same series. Attention has no bias towards neighbours; the branch brings it, which pays
    where training series are few. Convolutional bypasses of vision transformers do the same over an image. Tokens that
    are not patches (class token, prompts) pass D, act and U only. U starts at zero.

    Args:
        hidden_dim: Width of the bottleneck.
        kernel_size: Patches that the convolution spans, odd.
        scale: s.
        dropout: Probability of zeroing a hidden entry.
        blocks: Blocks to adapt; see `Selector`; None for all.

    Raises:
        ConfigError: A number is out of range.
    """

    identity_at_init = True

    def __init__(
        self,
        *,
        hidden_dim: int = 8,
        kernel_size: int = 3,
        scale: float = 1.0,
        dropout: float = 0.1,
        blocks: str | list[int] | None = None,
    ) -> None:
        problems = []
        if hidden_dim < 1:
            problems.append(f"method.hidden_dim: {hidden_dim} is below 1")
        if kernel_size < 1 or kernel_size % 2 == 0:
            problems.append(f"method.kernel_size: {kernel_size} is no odd number")
        if not 0.0 <= dropout < 1.0:
            problems.append(f"method.dropout: {dropout} is outside 0..1")
        if problems:
            raise ConfigError(*problems)
        self.hidden_dim = hidden_dim
        self.kernel_size = kernel_size
        self.scale = scale
        self.dropout = dropout
        self.where = Selector.parse({"blocks": blocks})

    def build(self, adapter: Adapter) -> None:
        """A branch from the normalised stream to the block's output, in every selected block.

        Raises:
            AttachError: The tokens of a block are no sequence in time.
        """
        anatomy = adapter.backbone.anatomy
        for tap in select_blocks(anatomy, self.where, role="mlp.norm.out"):
            layout = anatomy.layout(tap)
            if layout.body != "sequence":
                raise AttachError(f"'{tap.name}' holds {layout.body}; a convolution along time needs a sequence")
            branch = TemporalBottleneck(
                tap,
                layout,
                hidden_dim=self.hidden_dim,
                kernel_size=self.kernel_size,
                scale=self.scale,
                dropout=self.dropout,
            )
            adapter.branch(tap, anatomy.port("block.out", stack=tap.stack, block=tap.block), branch)


class TemporalBottleneck(nn.Module):
    """s * U dropout(act(h + K * h)) with h = D x.

    Args:
        port: Where it reads.
        layout: The tokens there.
        hidden_dim: Channels of the bottleneck.
        kernel_size: Patches that K spans.
        scale: s.
        dropout: Probability of zeroing a hidden entry.
    """

    uses_context = True

    def __init__(
        self, port: Port, layout: TokenLayout, *, hidden_dim: int, kernel_size: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.port, self.layout, self.scale = port, layout, scale
        self.down = nn.Linear(port.width, hidden_dim)
        self.conv = nn.Conv1d(hidden_dim, hidden_dim, kernel_size, padding=kernel_size // 2, groups=hidden_dim)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(hidden_dim, port.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, L, D) to the same shape."""
        hidden = self.down(x)  # (B, L, H)
        data = context.data_tokens(self.port, self.layout, x.shape[1])
        patches = hidden[:, data].unflatten(1, (context.get("num_channels"), -1))  # (B, C, N, H)
        lines = patches.flatten(0, 1).transpose(1, 2)  # (B*C, H, N)
        mixed = self.conv(lines).transpose(1, 2).unflatten(0, patches.shape[:2]).flatten(1, 2)  # (B, C*N, H)
        added = torch.cat(
            [torch.zeros_like(hidden[:, : data.start]), mixed, torch.zeros_like(hidden[:, data.stop :])], 1
        )
        return self.scale * self.up(self.dropout(self.act(hidden + added)))
