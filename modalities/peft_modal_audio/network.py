"""The Audio Spectrogram Transformer on timm's blocks; imports timm, so only the backbone does import it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from typing_extensions import override

from peft_modal_audio.positions import Grid, adapted
from peft_modal_audio.sizes import AstSizes


class OverlappingPatches(nn.Module):
    """Overlapping patches of a spectrogram; timm's own patch embedding has no stride.

    Args:
        sizes: Of the network.
    """

    def __init__(self, sizes: AstSizes) -> None:
        super().__init__()
        self.img_size: Grid = (sizes.mels, sizes.frames)
        self.patch_size: Grid = (sizes.patch, sizes.patch)
        self.grid_size = sizes.grid()
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(
            1, sizes.width, kernel_size=sizes.patch, stride=(sizes.stride_frequency, sizes.stride_time)
        )
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, M, T) to (B, F, T', D)."""
        return self.proj(x).permute(0, 2, 3, 1)


class SpectrogramTransformer(VisionTransformerDistilled):
    """[cls, dist, patches], frequency the slow axis of the latter, through a ViT; its tensors have timm's names.

    Args:
        sizes: Of the network.
        has_distillation: Whether the distillation token enters the sequence; its tensors are there in any case.
    """

    def __init__(self, sizes: AstSizes, *, has_distillation: bool = True) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            img_size=(sizes.mels, sizes.frames), patch_size=sizes.patch, in_chans=1, num_classes=0,
            embed_dim=sizes.width, depth=sizes.depth, num_heads=sizes.heads,
            # timm cuts the product with the width down to an integer.
            mlp_ratio=(sizes.mlp_width + 0.5) / sizes.width,
            qkv_bias=sizes.qkv_bias, norm_layer=functools.partial(nn.LayerNorm, eps=sizes.norm_eps),
            weight_init=sizes.weight_init, embed_layer=lambda **_: OverlappingPatches(sizes),
        )  # fmt: skip
        self.has_distillation = has_distillation

    @override
    def _pos_embed(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) of patches (B, F, T, D)."""
        own: Any = self
        positions = adapted(own.pos_embed, own.patch_embed.grid_size, (x.shape[1], x.shape[2]))
        first = [token.expand(len(x), -1, -1) for token in (own.cls_token, own.dist_token)]
        tokens = torch.cat([*first, x.flatten(1, 2)], dim=1) + positions
        if not self.has_distillation:
            tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
        return self.pos_drop(tokens)
