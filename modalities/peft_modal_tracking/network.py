"""The one-stream tracker: a plain ViT over the tokens of a template and of a search picture together."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.errors import ConfigError

Positions = Literal["interpolate", "slice"]
Grid = tuple[int, int]
"""Patches down and across."""


class OneStreamViT(nn.Module):
    """Blocks of a ViT with LoRAT's input embedding (Lin et al., ECCV 2024, arXiv:2403.05231).

    Search tokens are patch(x) + pos + type[2]; template tokens are patch(z) + the top left corner of the same pos +
    type[1] where the target lies and type[0] elsewhere. There is no class token. All tokens, the template's first, go
    through all blocks and the final norm.

    Args:
        vit: One of timm's `VisionTransformer`; its modules are taken over, not copied.
        template_grid: Patches of the template.
        search_grid: Patches of the search picture.
        positions: `interpolate` resizes the ViT's grid of positions to the search grid; `slice` takes its top left
            corner, as the authors' port to timm does.
        drop_path: Drop-path rate of every block.

    Raises:
        ConfigError: The ViT has no learned positions, the template is larger than the search picture, or `slice` finds
            too few positions.
    """

    def __init__(
        self,
        vit: Any,  # noqa: ANN401 — timm's class
        *,
        template_grid: Grid,
        search_grid: Grid,
        positions: Positions = "interpolate",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if getattr(vit, "pos_embed", None) is None or getattr(vit, "rope", None) is not None:
            raise ConfigError(
                "backbone.model: a tracker needs learned positions of patches, and this one has none; "
                "choose a plain ViT such as vit_base_patch14_dinov2"
            )
        if any(small > large for small, large in zip(template_grid, search_grid, strict=True)):
            raise ConfigError(
                f"backbone.template_size: {template_grid[0]} x {template_grid[1]} patches do not fit into the search "
                f"picture's {search_grid[0]} x {search_grid[1]}, whose positions they take"
            )
        self.embed_dim = int(vit.embed_dim)
        self.template_grid = template_grid
        self.search_grid = search_grid
        self.grad_checkpointing = False
        self.patch_embed = vit.patch_embed
        self.pos_embed = nn.Parameter(grid_positions(vit, search_grid, positions))
        self.token_type_embed = nn.Parameter(torch.empty(3, self.embed_dim))
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        # timm's networks that average their tokens keep the final norm behind the average.
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        nn.init.trunc_normal_(self.token_type_embed, std=0.02)
        for block in self.blocks:
            for name in ("drop_path1", "drop_path2"):
                setattr(block, name, uniform_drop_path(drop_path))

    def embed(self, template: Tensor, search: Tensor, mask: Tensor) -> Tensor:
        """Tokens before the first block.

        Args:
            template: (B, 3, h, w).
            search: (B, 3, H, W).
            mask: Template cells that show the target are 1, (B, rows, columns).

        Returns:
            (B, T + S, D), the template's first, each in rows.
        """
        patch = self.patch_embed.patch_size
        # One call for both, whose sizes differ: all patches side by side.
        patches = torch.cat([strip(template, patch), strip(search, patch)], dim=-1)
        # Contiguous: the convolution leaves channels first, and every later layer would keep that order.
        tokens = self.patch_embed(patches).flatten(1, 2).contiguous()
        positions = self.pos_embed.reshape(1, *self.search_grid, -1)  # (1, H / p, W / p, D)
        corner = positions[:, : self.template_grid[0], : self.template_grid[1]].flatten(1, 2)
        background, target, sought = self.token_type_embed
        kinds = torch.where(mask.flatten(1)[..., None] > 0, target, background)  # (B, T, D)
        around = self.pos_embed + sought
        added = torch.cat([corner + kinds, around.expand(len(tokens), -1, -1)], dim=1)
        return self.norm_pre(tokens + added)

    def forward(self, template: Tensor, search: Tensor, mask: Tensor) -> Tensor:
        """All tokens after the final norm, (B, T + S, D); see `embed`."""
        from timm.models import checkpoint_seq

        tokens = self.embed(template, search, mask)
        if self.grad_checkpointing:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            for block in self.blocks:
                tokens = block(tokens)
        return self.norm(tokens)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.grad_checkpointing = enable


def grid_positions(vit: Any, grid: Grid, positions: Positions) -> Tensor:  # noqa: ANN401 — timm's class
    """The position embedding of a ViT for another grid, (1, rows * columns, D), without the rows of prefix tokens.

    Bicubic and without antialiasing, as the published numbers are made; timm's own resampling antialiases.

    Raises:
        ConfigError: `slice` finds too few positions.
    """
    own: Grid = tuple(vit.patch_embed.grid_size)
    table = vit.pos_embed.detach()
    table = table[:, table.shape[1] - math.prod(own) :].unflatten(1, own)  # (1, h, w, D)
    if positions == "slice":
        if any(have < want for have, want in zip(own, grid, strict=True)):
            raise ConfigError(
                f"backbone.positions: 'slice' takes {grid[0]} x {grid[1]} positions, the network has {own[0]} x "
                f"{own[1]}; use interpolate"
            )
        return table[:, : grid[0], : grid[1]].flatten(1, 2).clone()
    resized = functional.interpolate(
        table.permute(0, 3, 1, 2).float(), size=grid, mode="bicubic", align_corners=False, antialias=False
    )
    return resized.flatten(2).transpose(1, 2).to(table.dtype).contiguous()


def strip(image: Tensor, patch: Grid) -> Tensor:
    """The patches of a picture (B, 3, H, W) in rows, side by side: (B, 3, p, N * p)."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = image.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(batch, channels, patch[0], rows * columns * patch[1])


def uniform_drop_path(rate: float) -> nn.Module:
    """Drop-path of one branch; above 0.1 the form of DINOv2's code, which drops a fixed number of a batch's samples."""
    from timm.layers.drop import DropPath

    if not rate:
        return nn.Identity()
    return DropPath(rate) if rate <= 0.1 else SubsetDropPath(rate)


class SubsetDropPath(nn.Module):
    """Keeps floor(B (1 - p)) samples of a branch, at least one, scaled by B over their number.

    Args:
        rate: p.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """The branch (B, ...), or zero for the samples that are dropped."""
        if not self.training:
            return branch
        count = len(branch)
        kept = max(1, math.floor(count * (1 - self.rate)))
        chosen = torch.randperm(count, device=branch.device)[:kept]
        factor = branch.new_zeros(count).index_fill(0, chosen, count / kept)
        return branch * factor.view(-1, *(1 for _ in branch.shape[1:]))
