"""Tiny real networks of three libraries with their anatomies: the proof that the core's nouns fit other modalities.

A timm ViT (fused qkv), an open_clip model (MultiheadAttention's packed input, an `out_proj` that is never called, two
stacks) and a diffusers U-Net (convolutions, cross-attention). The first and the last have no modality of their own yet.
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


class TinyUNet(Backbone):
    """diffusers' UNet2DConditionModel at toy size: convolutions, group norms, self- and cross-attention."""

    modality = "diffusion"

    def __init__(self, *, frozen_mode: Any = "eval") -> None:
        from diffusers import UNet2DConditionModel

        net = seeded(
            lambda: UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=12,
                attention_head_dim=4,
                norm_num_groups=4,
            )
        )
        b = AnatomyBuilder(net, stack="unet")
        self._ops = {"unet.down": 0, "unet.mid": 0, "unet.up": 0}
        b.op("conv", "conv_in")
        b.op("time", "time_embedding.linear_1")
        b.op("time", "time_embedding.linear_2")
        for i, down in enumerate(net.down_blocks):
            self._stage(b, "unet.down", f"down_blocks.{i}", down)
        b.enter("unet.mid")
        self._stage(b, "unet.mid", "mid_block", net.mid_block)
        for i, up in enumerate(net.up_blocks):
            self._stage(b, "unet.up", f"up_blocks.{i}", up)
        b.enter("unet")
        b.op("norm", "conv_norm_out")
        b.op("conv", "conv_out")
        super().__init__(net, b.build(layouts={}), frozen_mode=frozen_mode)

    def _stage(self, b: AnatomyBuilder, stack: str, path: str, stage: nn.Module) -> None:
        resnets = len(stage.resnets)
        attentions = len(getattr(stage, "attentions", ()))
        # The middle block runs resnet, attention, resnet; the others alternate.
        for i in range(resnets):
            b.enter(stack)
            self._resnet(b, f"{path}.resnets.{i}", stage.resnets[i])
            if i < attentions:
                width = stage.attentions[i].proj_out.out_channels
                b.op("norm", f"{path}.attentions.{i}.norm")
                b.op("conv", f"{path}.attentions.{i}.proj_in")
                self._transformer(b, stack, f"{path}.attentions.{i}.transformer_blocks.0", self._ops[stack], width)
                self._ops[stack] += 1
                b.enter(stack)
                b.op("conv", f"{path}.attentions.{i}.proj_out")
        for kind in ("downsamplers", "upsamplers"):
            for i, sampler in enumerate(getattr(stage, kind, None) or ()):
                if getattr(sampler, "conv", None) is not None:
                    b.op("conv", f"{path}.{kind}.{i}.conv")

    @staticmethod
    def _resnet(b: AnatomyBuilder, path: str, module: nn.Module) -> None:
        b.op("norm", f"{path}.norm1")
        b.op("conv", f"{path}.conv1")
        b.op("time.proj", f"{path}.time_emb_proj")
        b.op("norm", f"{path}.norm2")
        b.op("conv", f"{path}.conv2")
        if module.conv_shortcut is not None:
            b.op("conv", f"{path}.conv_shortcut")

    @staticmethod
    def _transformer(b: AnatomyBuilder, stack: str, path: str, index: int, width: int) -> None:
        b.enter(stack, index)
        b.port("block.in", path, "in", width=width, allows=("read", "add", "replace"))
        for norm, attn, role in (("norm1", "attn1", "attn"), ("norm2", "attn2", "cross")):
            b.op("norm", f"{path}.{norm}")
            b.port(f"{role}.norm.out", f"{path}.{norm}", "out", width=width)
            for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
                b.op(f"{role}.{part}", f"{path}.{attn}.{name}")
            b.port(f"{role}.out", f"{path}.{attn}", "out", width=width)
        b.port("mlp.norm.in", f"{path}.norm3", "in", width=width)
        b.op("norm", f"{path}.norm3")
        b.port("mlp.norm.out", f"{path}.norm3", "out", width=width)
        b.op("mlp.in", f"{path}.ff.net.0.proj")
        b.op("mlp.out", f"{path}.ff.net.2")
        b.port("mlp.out", f"{path}.ff", "out", width=width)
        b.port("block.out", path, "out", width=width, allows=("read", "add", "replace"))

    @property
    @override
    def feature_width(self) -> int:
        return 4

    @override
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        context.put("time", batch["time"])
        out = self.network(batch["sample"], batch["time"], encoder_hidden_states=batch["text"]).sample
        return Features(out, None)

    @override
    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(1)
        return {
            "sample": torch.randn(batch_size, 4, 8, 8, generator=g),
            "time": torch.randint(0, 1000, (batch_size,), generator=g),
            "text": torch.randn(batch_size, 5, 12, generator=g),
        }

    @override
    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        (self.network.enable_gradient_checkpointing if enabled else self.network.disable_gradient_checkpointing)()
