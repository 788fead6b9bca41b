"""The network: patches of every channel as one token sequence, through pre-norm transformer blocks.

What an adapter may read or change is the input or output of a submodule that is called exactly once per forward pass;
that is why each residual branch ends in a dropout module of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peft_modal.errors import ConfigError, DataError

INIT_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to the same shape."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D/H) each
        return self.proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + dropout(attention(norm x)), then the same with the MLP."""

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=num_heads)
        self.drop1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden_dim=int(dim * mlp_ratio))
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream (B, N, D) behind the block."""
        x = x + self.drop1(self.attn(self.norm1(x)))
        return x + self.drop2(self.mlp(self.norm2(x)))


class Assemble(nn.Module):
    """Adds positions and puts the class token in front; a module, so that its output is a place to attach."""

    def forward(self, patches: Tensor, cls_token: Tensor, time: Tensor, channels: Tensor) -> Tensor:
        """The sequence (B, 1 + C*N, D), channel after channel.

        Args:
            patches: Embedded patches (B, C, N, D).
            cls_token: (1, 1, D).
            time: A position for each place in time, (N, D).
            channels: A position for each channel, (C, D).
        """
        tokens = (patches + time + channels[:, None]).flatten(1, 2)
        return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)


class PatchTransformer(nn.Module):
    """A transformer encoder over patches of a series with one or more channels.

    Patches are the tokens (Nie et al., ICLR 2023, arXiv:2211.14730). There, each channel is a sequence of its own; here
    the patches of all channels form one sequence, so that channels see each other and a sample has one class token.

    Args:
        dim: Width D of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        patch_len: Steps per patch; patches do not overlap.
        max_patches: Patches per channel that have a position.
        max_channels: Channels that have a position.
        mlp_ratio: Hidden width of a block's MLP over D.
        dropout: Share of each branch's entries that is zeroed in training.

    Raises:
        ConfigError: A size is not usable.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        patch_len: int,
        max_patches: int,
        max_channels: int,
        mlp_ratio: float,
        dropout: float,
    ) -> None:
        sizes = {
            "dim": dim, "depth": depth, "num_heads": num_heads, "patch_len": patch_len, "max_patches": max_patches,
            "max_channels": max_channels,
        }  # fmt: skip
        problems = [f"backbone.{name}: {value} is below 1" for name, value in sizes.items() if value < 1]
        if not problems and dim % num_heads:
            problems.append(f"backbone.num_heads: {num_heads} does not divide the width {dim}")
        if not 0.0 <= dropout < 1.0:
            problems.append(f"backbone.dropout: {dropout} is outside 0..1")
        if problems:
            raise ConfigError(*problems)
        super().__init__()
        self.dim, self.patch_len = dim, patch_len
        self.patch_embed = nn.Linear(patch_len, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.time_pos = nn.Parameter(torch.empty(max_patches, dim))
        self.channel_pos = nn.Parameter(torch.empty(max_channels, dim))
        self.assemble = Assemble()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.grad_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bare parameters from a normal distribution; the layers keep PyTorch's own start."""
        for parameter in (self.cls_token, self.time_pos, self.channel_pos):
            nn.init.normal_(parameter, std=INIT_STD)

    def patches(self, series: Tensor) -> Tensor:
        """Patches (B, C, N, P) of series (B, C, T); steps at the end that fill no patch are left out.

        Raises:
            DataError: The series have no patch, or more patches or channels than there are positions.
        """
        if series.dim() != 3:
            raise DataError(f"expected series of shape (batch, channels, steps), got {tuple(series.shape)}")
        samples, channels, steps = series.shape
        count, (most, _), (widest, _) = steps // self.patch_len, self.time_pos.shape, self.channel_pos.shape
        if not 1 <= count <= most:
            raise DataError(
                f"series of {steps} steps do not fit a backbone that takes {self.patch_len} to "
                f"{most * self.patch_len + self.patch_len - 1}; set data.length, or backbone.max_patches"
            )
        if channels > widest:
            raise DataError(f"series have {channels} channels, the backbone takes {widest}; set backbone.max_channels")
        return series[..., : count * self.patch_len].reshape(samples, channels, count, self.patch_len)

    def forward(self, series: Tensor) -> Tensor:
        """Tokens (B, 1 + C*N, D) behind the final norm, of series (B, C, T)."""
        patches = self.patches(series)
        _, channels, count, _ = patches.shape
        embedded = self.patch_embed(patches.to(self.cls_token.dtype))
        x = self.assemble(embedded, self.cls_token, self.time_pos[:count], self.channel_pos[:channels])
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                # `block` is called, not its forward, so that hooks on it run again within the recomputation.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)
