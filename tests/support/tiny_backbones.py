"""Tiny real networks of three libraries with their anatomies: the proof that the core's nouns fit other modalities.

A timm ViT (fused qkv), an open_clip model (MultiheadAttention's packed input, an `out_proj` that is never called, two
stacks) and a diffusers U-Net (convolutions, cross-attention).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from peft_modal_clip.backbone import TINY, OpenCLIPBackbone
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_vision.backbone import ViT


class TinyViT(ViT):
    """The vision modality's ViT at toy size."""

    def __init__(
        self,
        *,
        depth: int = 3,
        width: int = 32,
        num_heads: int = 2,
        img_size: int = 16,
        patch_size: int = 4,
        mlp_ratio: float = 2.0,
        frozen_mode: Any = "eval",
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
    ) -> None:
        sizes = {
            "img_size": img_size, "patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": num_heads,
            "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "norm_layer": partial(nn.LayerNorm, eps=norm_eps),
        }  # fmt: skip
        self.img_size = img_size
        self.width = width
        super().__init__(model="custom", weights="random", sizes=sizes, drop_path=drop_path, frozen_mode=frozen_mode)


class TinyCLIP(OpenCLIPBackbone):
    """The CLIP modality's backbone at toy size: two stacks, packed attention weights read inside a function."""

    depth = TINY["vision_layers"]

    def __init__(self, *, frozen_mode: Any = "eval") -> None:
        super().__init__(**TINY, frozen_mode=frozen_mode)


class TinyResNetCLIP(OpenCLIPBackbone):
    """The same with CLIP's ResNet of four stages, one of them with two blocks; no branch of it is zero."""

    def __init__(self, *, frozen_mode: Any = "eval") -> None:
        sizes = {key: value for key, value in TINY.items() if key != "patch_size"}
        super().__init__(
            **{**sizes, "image_size": 64, "vision_width": 8, "vision_layers": [1, 2, 1, 1], "vision_heads": 4},
            frozen_mode=frozen_mode,
        )
        generator = torch.Generator().manual_seed(3)
        for name, parameter in self.network.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.data.uniform_(0.5, 1.5, generator=generator)


class TinyUNet(StableDiffusion):
    """The diffusion modality's U-Net at toy size: convolutions, group norms, self- and cross-attention."""

    def __init__(self, *, frozen_mode: Any = "eval") -> None:
        super().__init__(weights="random", architecture="toy", frozen_mode=frozen_mode)
