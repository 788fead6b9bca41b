"""Tiny real networks of three libraries with their anatomies: the proof that the core's nouns fit other modalities.

A timm ViT (fused qkv), an open_clip model (MultiheadAttention's packed input, an `out_proj` that is never called, two
stacks) and a diffusers U-Net (convolutions, cross-attention). The first has no modality of its own yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import AnatomyBuilder, Backbone, Context, Features, Segment, TokenLayout
from peft_modal_clip.backbone import TINY, OpenCLIPBackbone
from peft_modal_diffusion.backbone import StableDiffusion


def seeded(build: Any) -> Any:
    """Build a network from fixed random numbers and leave the global state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


class TinyViT(Backbone):
    """timm's VisionTransformer at toy size."""

    modality = "vision"

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
        from timm.models.vision_transformer import VisionTransformer

        net = seeded(
            lambda: VisionTransformer(
                img_size=img_size,
                patch_size=patch_size,
                embed_dim=width,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                num_classes=0,
                drop_path_rate=drop_path,
                qkv_bias=qkv_bias,
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            )
        )
        self.img_size = img_size
        self.width = width
        b = AnatomyBuilder(net)
        b.raw("cls", "cls_token", decay=False)
        b.raw("pos", "pos_embed")
        b.op("embed", "patch_embed.proj")
        b.port("embed.out", "norm_pre", "out", width=width)
        for i in range(depth):
            timm_block(b, i, width=width, heads=num_heads)
        b.enter("blocks")
        b.port("final.norm.in", "norm", "in", width=width, allows=("read", "add", "replace", "tokens"))
        b.op("norm", "norm")
        b.port("final.norm.out", "norm", "out", width=width, allows=("read", "add", "replace", "tokens"))
        layout = TokenLayout(segments=(Segment("cls", 1), Segment("patches", None)), body="grid", prompt_index=1)
        super().__init__(net, b.build(layouts={"blocks": layout}), frozen_mode=frozen_mode)

    @property
    @override
    def feature_width(self) -> int:
        return self.width

    @override
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        tokens = self.network.forward_features(batch["image"])
        return Features(tokens, self.anatomy.layouts["blocks"])

    @override
    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {"image": torch.randn(batch_size, 3, self.img_size, self.img_size, generator=generator)}

    @override
    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        self.network.set_grad_checkpointing(enabled)


def timm_block(
    b: AnatomyBuilder, i: int, *, width: int, heads: int, prefix: str = "blocks", stack: str = "blocks"
) -> None:
    """Sites and ports of one timm ViT block, in order of execution."""
    path = f"{prefix}.{i}"
    stream = ("read", "add", "replace", "tokens")
    b.enter(stack, i)
    b.port("block.in", path, "in", width=width, allows=stream)
    b.op("norm", f"{path}.norm1")
    b.port("attn.norm.out", f"{path}.norm1", "out", width=width)
    b.fused(
        "attn.qkv",
        f"{path}.attn.qkv",
        {"attn.q": f"{path}.attn.q", "attn.k": f"{path}.attn.k", "attn.v": f"{path}.attn.v"},
        heads=heads,
    )
    b.op("attn.out", f"{path}.attn.proj")
    b.port("attn.out", f"{path}.attn", "out", width=width)
    b.port("attn.branch", f"{path}.drop_path1", "out", width=width)
    b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
    b.op("norm", f"{path}.norm2")
    b.port("mlp.norm.out", f"{path}.norm2", "out", width=width)
    b.op("mlp.in", f"{path}.mlp.fc1")
    b.op("mlp.out", f"{path}.mlp.fc2")
    b.port("mlp.out", f"{path}.mlp", "out", width=width)
    b.port("mlp.branch", f"{path}.drop_path2", "out", width=width)
    b.port("block.out", path, "out", width=width, allows=stream)


class TinyCLIP(OpenCLIPBackbone):
    """The CLIP modality's backbone at toy size: two stacks, packed attention weights read inside a function."""

    depth = TINY["vision_layers"]

    def __init__(self, *, frozen_mode: Any = "eval") -> None:
        super().__init__(**TINY, frozen_mode=frozen_mode)


class TinyUNet(StableDiffusion):
    """The diffusion modality's U-Net at toy size: convolutions, group norms, self- and cross-attention."""

    def __init__(self, *, frozen_mode: Any = "eval") -> None:
        super().__init__(weights="random", architecture="toy", frozen_mode=frozen_mode)
