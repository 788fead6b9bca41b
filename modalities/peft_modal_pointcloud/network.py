"""The plain point-cloud transformer of Point-MAE, Point-BERT, ACT and ReCon fine-tuning, without a head.

Parameter names are those of the released files, so these load without renaming. What an adapter may read or change is
the input or output of a submodule that is called exactly once per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peft_modal.errors import ConfigError
from peft_modal_pointcloud.sampling import Grouping, select_patches

Init = Literal["card", "torch"]
"""`card`: normal(0, 0.02) as the authors train from scratch; `torch`: PyTorch's own defaults."""

INIT_STD = 0.02


@dataclass(frozen=True)
class Encoded:
    """What one pass of `PointMAE` computed; V patches are visible, all G of them without a mask."""

    tokens: Tensor
    """After the final norm: (B, 1+G, D) with the class token first; (B, V, D) with a mask or without a class token."""
    centres: Tensor
    """Patch centres (B, G, 3)."""
    neighbourhood: Tensor
    """Patches (B, G, M, 3) relative to their centre."""
    positions: Tensor
    """Position embedding of the visible patches (B, V, D)."""
    patch_tokens: Tensor
    """Patch embeddings before positions and blocks, (B, G, D), or (B, V, D) if masked patches were not embedded."""
    levels: tuple[Tensor, ...] = ()
    """Patch tokens behind the blocks of `PointMAE.levels`, after the final norm, (B, V, D) each."""


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and scales the rest by 1/(1-rate) (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """The branch (B, ...), zero for the dropped samples while training."""
        if not self.training:
            return branch
        keep = 1.0 - self.rate
        # torch's global generator: a checkpointed block must draw the same samples when it is recomputed.
        draw = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        return branch * draw.div_(keep)

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate:.4g}"


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection without bias, scores scaled by head_dim^-0.5."""

    def __init__(self, dim: int, *, num_heads: int, **factory: Any) -> None:  # noqa: ANN401  factory kwargs of torch
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The attention branch (B, N, D) of normalised tokens (B, N, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D/H) each
        return self.proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, *, hidden_dim: int, **factory: Any) -> None:  # noqa: ANN401  factory kwargs of torch
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP branch (B, N, D) of normalised tokens (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block.

    The authors share one drop-path module between the two branches. Here each branch has its own, which draws alike
    and lets an adapter reach either branch; neither has parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = Attention(dim, num_heads=num_heads, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = MLP(dim, hidden_dim=int(dim * mlp_ratio), **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream (B, N, D) behind the block; `x` (B, N, D) already has positions added."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def build_blocks(
    dim: int,
    *,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleList:
    """`depth` blocks whose drop-path rate grows linearly from 0 in the first to `drop_path` in the last.

    Raises:
        ConfigError: `num_heads` does not divide `dim`, `depth` is below 1, or `drop_path` is outside 0..1.
    """
    problems = []
    if num_heads < 1 or dim % num_heads:
        problems.append(f"point transformer: num_heads is {num_heads}, which does not divide the width {dim}.")
    if depth < 1:
        problems.append(f"point transformer: depth is {depth}; it needs at least 1 block.")
    if not 0 <= drop_path < 1:
        problems.append(f"point transformer: drop_path is {drop_path}; it is a probability from 0 to below 1.")
    if problems:
        raise ConfigError(*problems)
    rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
    return nn.ModuleList(
        Block(dim, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=rate, device=device, dtype=dtype)
        for rate in rates
    )


class PointwiseConv1d(nn.Conv1d):
    """A convolution of kernel size 1 with bias, computed as one product per cloud.

    The weight, the numbers and the gradients are those of `Conv1d`; on a CPU a training pass through the
    mini-PointNet takes a quarter to a third less time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Channels (B, out, L) of `x` (B, in, L)."""
        assert self.bias is not None
        weight = self.weight[:, :, 0].expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x)


class MiniPointNet(nn.Module):
    """Embeds each patch by two shared point-wise stages with a max pool behind each.

    The ReLUs work out of place: what a hook read at a norm's output must stay what it was.
    Between the stages the patch's pooled feature g is concatenated in front of every point's feature f. Splitting the
    next matrix over [g, f] would save the g part for all but one point, but that convolution must receive one input
    so that an adapter can act on it; at 32/64/128 channels the split brings no measurable time.

    Args:
        dim: Width of the token.
        widths: Channels of the three inner convolutions; the published networks have 128, 256, 512.
    """

    def __init__(
        self,
        dim: int,
        *,
        widths: Sequence[int] = (128, 256, 512),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        first, second, third = widths
        self.first_conv = nn.Sequential(
            PointwiseConv1d(3, first, 1, **factory),
            nn.BatchNorm1d(first, **factory),
            nn.ReLU(),
            PointwiseConv1d(first, second, 1, **factory),
        )
        self.second_conv = nn.Sequential(
            PointwiseConv1d(2 * second, third, 1, **factory),
            nn.BatchNorm1d(third, **factory),
            nn.ReLU(),
            PointwiseConv1d(third, dim, 1, **factory),
        )

    def forward(self, neighbourhood: Tensor) -> Tensor:
        """Tokens (B, G, D) of patches (B, G, M, 3)."""
        patches = neighbourhood.shape[1:3]
        # The points of all patches form one axis: the same numbers as one patch per row, in larger matrix products.
        x = self.first_conv(neighbourhood.flatten(1, 2).transpose(1, 2)).unflatten(2, patches)  # (B, C, G, M)
        pooled = x.max(3, keepdim=True).values.expand_as(x)
        x = self.second_conv(torch.cat([pooled, x], dim=1).flatten(2)).unflatten(2, patches)  # (B, D, G, M)
        return x.max(3).values.transpose(1, 2)


class Assemble(nn.Module):
    """Puts the class entry in front of the patches' entries; a module so that its output is a place to attach."""

    def forward(self, patches: Tensor, first: Tensor | None = None) -> Tensor:
        """The sequence (B, 1+G, D) from patches (B, G, D) and `first` (1, 1, D), or the patches without `first`."""
        if first is None:
            return patches
        return torch.cat([first.expand(patches.shape[0], -1, -1), patches], dim=1)


class TransformerEncoder(nn.Module):
    """Blocks with the positions added again in front of each, so that they stay in the residual stream."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        self.grad_checkpointing = False

    def forward(self, x: Tensor, positions: Tensor, levels: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """The residual stream behind the last block, and behind the blocks `levels`; everything is (B, N, D)."""
        kept = []
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                # `block` is called, not its forward, so that hooks on it run again within the recomputation.
                x = checkpoint(block, x + positions, use_reentrant=False)
            else:
                x = block(x + positions)
            if index in levels:
                kept.append(x)
        return x, kept


def position_mlp(
    dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Sequential:
    """Linear(3, 128), exact GELU, Linear(128, dim) on raw centre coordinates."""
    return nn.Sequential(
        nn.Linear(3, 128, device=device, dtype=dtype),
        nn.GELU(),
        nn.Linear(128, dim, device=device, dtype=dtype),
    )


@torch.no_grad()
def reset_layers(module: nn.Module, init: Init) -> None:
    """Draws every linear and convolution below `module` anew and resets every norm, statistics included."""
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm1d):
            layer.reset_parameters()
        elif isinstance(layer, nn.Linear | nn.Conv1d):
            if init == "torch":
                layer.reset_parameters()
                continue
            nn.init.normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class PointMAE(nn.Module):
    """The Point-MAE transformer (Pang et al., ECCV 2022, arXiv:2203.06604): coordinates in, normalised tokens out.

    Farthest points become patch centres, a mini-PointNet embeds each patch, an MLP of the centre is its position, and
    pre-norm blocks follow. Point-BERT files need `encoder_dim=256`, which adds the linear `reduce_dim`.

    Args:
        dim: Width D of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        num_group: Patches G per cloud; 64 for 1024 points, 128 for 2048.
        group_size: Points M per patch.
        mlp_ratio: Hidden width of a block's MLP over D.
        drop_path: Drop-path rate of the last block; it grows linearly from 0 in the first.
        encoder_dim: Width of the mini-PointNet's token, `dim` when not given.
        pointnet_dims: Inner widths of the mini-PointNet.
        has_cls: Put a class token in front of the patches; part segmentation has none.
        levels: Blocks, ascending and zero-based, whose patch tokens are kept too, normalised by the final norm.
        init: How `reset_parameters` draws linear and convolution weights.
        device: Where the parameters are created.
        dtype: Their type.

    Raises:
        ConfigError: A size is not usable.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_group: int = 64,
        group_size: int = 32,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        encoder_dim: int | None = None,
        pointnet_dims: Sequence[int] = (128, 256, 512),
        has_cls: bool = True,
        levels: Sequence[int] = (),
        init: Init = "card",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_group=num_group, group_size=group_size, pointnet_dims=pointnet_dims, init=init)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        encoder_dim = dim if encoder_dim is None else encoder_dim
        self.dim = dim
        self.init: Init = init
        self.group_divider = Grouping(num_group=num_group, group_size=group_size)
        self.encoder = MiniPointNet(encoder_dim, widths=pointnet_dims, **factory)
        self.reduce_dim = nn.Identity() if encoder_dim == dim else nn.Linear(encoder_dim, dim, **factory)
        self.levels = tuple(levels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory)) if has_cls else None
        self.cls_pos = nn.Parameter(torch.empty(1, 1, dim, **factory)) if has_cls else None
        self.pos_embed = position_mlp(dim, **factory)
        self.embed = Assemble()
        self.embed_positions = Assemble()
        self.blocks = TransformerEncoder(
            build_blocks(dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path, **factory)
        )
        self.norm = nn.LayerNorm(dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew from torch's global generator; norms and their statistics return to 0 and 1."""
        reset_layers(self, self.init)
        for token in (self.cls_token, self.cls_pos):
            if token is not None:
                nn.init.normal_(token, std=INIT_STD)

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recomputes every block during the backward pass instead of keeping its activations."""
        self.blocks.grad_checkpointing = on

    def forward(self, points: Tensor, *, mask: Tensor | None = None, embed_masked: bool = True) -> Encoded:
        """Encodes clouds, or only the visible patches of clouds for masked pre-training.

        With a mask, positions and blocks see the visible patches only, and there is no class token.

        Args:
            points: Coordinates (B, N, 3).
            mask: Boolean (B, G), true for the patches to hide, equally many in each cloud.
            embed_masked: Whether masked patches pass the mini-PointNet too, whose batch statistics then cover them,
                as in the authors' code. Off, a pre-training step of a small network takes about half the time.

        Returns:
            Tokens, positions and patches.

        Raises:
            ConfigError: A cloud has fewer points than a patch, or the mask does not fit.
            DataError: `points` is not (B, N, 3).
        """
        neighbourhood, centres = self.group_divider(points)
        dtype = self.norm.weight.dtype
        patches = neighbourhood if mask is None or embed_masked else select_patches(neighbourhood, ~mask)
        patch_tokens = self.reduce_dim(self.encoder(patches.to(dtype)))
        if mask is None:
            positions = self.pos_embed(centres.to(dtype))
            x = self.embed(patch_tokens, self.cls_token)
            p = self.embed_positions(positions, self.cls_pos)
        else:
            positions = self.pos_embed(select_patches(centres.to(dtype), ~mask))
            x = self.embed(select_patches(patch_tokens, ~mask) if embed_masked else patch_tokens)
            p = self.embed_positions(positions)
        tokens, levels = self._normalised(*self.blocks(x, p, self.levels), num_patches=positions.shape[1])
        return Encoded(
            tokens=tokens,
            centres=centres,
            neighbourhood=neighbourhood,
            positions=positions,
            patch_tokens=patch_tokens,
            levels=levels,
        )

    def _normalised(self, last: Tensor, levels: list[Tensor], *, num_patches: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last stream (B, N, D) and the patches of `levels` through the final norm, which is called once.

        What a method inserts, reads or changes there stands in front or is done to every token alike, so the levels
        follow behind the sequence.
        """
        if not levels:
            return self.norm(last), ()
        num_tokens = last.shape[1]
        patches = [stream[:, num_tokens - num_patches :] for stream in levels]
        normed = self.norm(torch.cat([last, *patches], dim=1))  # (B, N + levels * V, D)
        tokens, *kept = normed.split([num_tokens, *[num_patches] * len(levels)], dim=1)
        return tokens, tuple(kept)


def _check_sizes(*, num_group: int, group_size: int, pointnet_dims: Sequence[int], init: str) -> None:
    problems = [
        f"point transformer: {name} is {value}; it needs at least 1."
        for name, value in (("num_group", num_group), ("group_size", group_size))
        if value < 1
    ]
    if len(pointnet_dims) != 3:
        problems.append(f"point transformer: pointnet_dims needs 3 widths, got {list(pointnet_dims)}.")
    if init not in {"card", "torch"}:
        problems.append(f"point transformer: init is '{init}'; use 'card' or 'torch'.")
    if problems:
        raise ConfigError(*problems)
