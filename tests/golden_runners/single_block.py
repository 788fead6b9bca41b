"""Backbones around bare timm modules: blocks, or an attention alone; tokens in, tokens out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import AnatomyBuilder, Backbone, Context, Features, Segment, TokenLayout
from peft_modal_vision.anatomy import describe_block


class TokenBackbone(Backbone):
    """Runs a network on tokens (B, N, D) as they are; base of the two below."""

    modality = "vision"
    width: int

    @property
    @override
    def feature_width(self) -> int:
        return self.width

    @override
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        return Features(self.network(batch["tokens"]), None)

    @override
    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"tokens": torch.zeros(batch_size, 5, self.width)}


class BareBlocks(TokenBackbone):
    """Blocks of a ViT without a final norm; their tensors are called `blocks.0.*` and so on."""

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm_eps: float,
        drop_path: float = 0.0,
        depth: int = 1,
        prefix_tokens: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        norm_layer = functools.partial(nn.LayerNorm, eps=norm_eps)
        blocks = [
            Block(width, num_heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer, drop_path=drop_path)
            for _ in range(depth)
        ]
        network = nn.Sequential()
        network.add_module("blocks", nn.Sequential(*blocks))
        b = AnatomyBuilder(network)
        for index, block in enumerate(blocks):
            describe_block(b, index, block, width=width)
        self.width = width
        self.grid = grid
        super().__init__(network, b.build(layouts=_layouts(prefix_tokens)))

    @override
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        if self.grid is not None:
            context.put("grid", self.grid)
        return super().extract(batch, context)


class OneAttention(TokenBackbone):
    """One attention of a ViT; its tensors are called `attn.*`."""

    def __init__(self, *, width: int, num_heads: int, qkv_bias: bool, prefix_tokens: int | None = None) -> None:
        network = nn.Sequential()
        network.add_module("attn", Attention(width, num_heads=num_heads, qkv_bias=qkv_bias))
        b = AnatomyBuilder(network)
        b.enter("blocks", 0)
        parts = {role: role for role in ("attn.q", "attn.k", "attn.v")}
        b.fused("attn.qkv", "attn.qkv", parts, heads=num_heads)
        b.op("attn.out", "attn.proj")
        b.port("attn.out", "attn", "out", width=width)
        self.width = width
        super().__init__(network, b.build(layouts=_layouts(prefix_tokens)))


def _layouts(prefix_tokens: int | None) -> dict[str, TokenLayout]:
    if prefix_tokens is None:
        return {}
    segments = (Segment("cls", prefix_tokens), Segment("patches", None))
    return {"blocks": TokenLayout(segments=segments, body="grid", prompt_index=prefix_tokens)}
