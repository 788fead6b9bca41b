"""Building open_clip's CLIP, its anatomy, and finding its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_modal.anatomy import Anatomy, AnatomyBuilder, Segment, TokenLayout
from peft_modal.anatomy.sites import Access
from peft_modal.extras import require
from peft_modal_clip.resnet import resnet_sites
from peft_modal_clip.sizes import ClipSizes

if TYPE_CHECKING:
    from open_clip.model import CLIP

_STREAM: tuple[Access, ...] = ("read", "add", "replace")
_TOKENS: tuple[Access, ...] = (*_STREAM, "tokens")


def build_clip(sizes: ClipSizes, *, init_seed: int) -> CLIP:
    """A CLIP with open_clip's initial values.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    open_clip = require("open_clip.model", extra="clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        network: CLIP = open_clip.CLIP(**sizes.config())
    return network


def clip_anatomy(network: CLIP, sizes: ClipSizes) -> Anatomy:
    """Sites and ports of both towers, in order of execution."""
    b = AnatomyBuilder(network, stack="visual")
    if isinstance(sizes.vision_layers, int):
        _transformer_tower(b, sizes, sizes.vision_layers)
    else:
        resnet_sites(b, network.visual)
    b.enter("text")
    b.op("embed", "token_embedding", name="text.token_embedding")
    b.raw("pos", "positional_embedding")
    for i in range(sizes.text_layers):
        path = f"transformer.resblocks.{i}"
        _block(b, "text", path, i, width=sizes.text_width, heads=sizes.text_heads, allows=_STREAM)
    b.enter("text")
    b.op("norm", "ln_final")
    b.raw("proj", "text_projection")
    visual = TokenLayout(segments=(Segment("cls", 1), Segment("patches", None)), body="grid", prompt_index=1)
    text = TokenLayout(
        segments=(Segment("text", None),),
        body="sequence",
        prompt_index=None,
        reason="the causal mask has a fixed length",
    )
    return b.build(layouts={"text": text} if sizes.is_resnet else {"visual": visual, "text": text})


def _transformer_tower(b: AnatomyBuilder, sizes: ClipSizes, depth: int) -> None:
    width = sizes.vision_width
    b.raw("cls", "visual.class_embedding", owner="visual", called_owner=True, decay=False)
    b.raw("pos", "visual.positional_embedding", owner="visual", called_owner=True)
    b.op("embed", "visual.conv1")
    b.op("norm", "visual.ln_pre")
    b.port("embed.out", "visual.ln_pre", "out", width=width)
    for i in range(depth):
        path = f"visual.transformer.resblocks.{i}"
        _block(b, "visual", path, i, width=width, heads=sizes.vision_heads, allows=_TOKENS)
    b.enter("visual")
    b.port("final.norm.in", "visual.ln_post", "in", width=width, allows=_STREAM)
    b.op("norm", "visual.ln_post")
    b.port("final.norm.out", "visual.ln_post", "out", width=width, allows=_STREAM)
    b.raw("proj", "visual.proj", owner="visual", called_owner=True)


def _block(
    b: AnatomyBuilder, stack: str, path: str, i: int, *, width: int, heads: int, allows: tuple[Access, ...]
) -> None:
    name = f"{stack}.blocks.{i}"
    b.enter(stack, i)
    b.port("block.in", path, "in", width=width, allows=allows)
    b.op("norm", f"{path}.ln_1", name=f"{name}.norm1")
    b.port("attn.norm.out", f"{path}.ln_1", "out", width=width)
    b.fused(
        "attn.qkv",
        f"{path}.attn",
        {"attn.q": f"{name}.attn.q", "attn.k": f"{name}.attn.k", "attn.v": f"{name}.attn.v"},
        tensor="in_proj_weight",
        bias="in_proj_bias",
        name=f"{name}.attn.qkv",
        heads=heads,
        called=False,
    )
    b.read("attn.out", f"{path}.attn.out_proj", owner=f"{path}.attn", name=f"{name}.attn.out")
    b.port("attn.out", f"{path}.attn", "out", width=width, item=0)
    b.port("attn.branch", f"{path}.ls_1", "out", width=width)
    b.port("mlp.norm.in", f"{path}.ln_2", "in", width=width)
    b.op("norm", f"{path}.ln_2", name=f"{name}.norm2")
    b.port("mlp.norm.out", f"{path}.ln_2", "out", width=width)
    b.op("mlp.in", f"{path}.mlp.c_fc", name=f"{name}.mlp.in")
    b.op("mlp.out", f"{path}.mlp.c_proj", name=f"{name}.mlp.out")
    b.port("mlp.out", f"{path}.mlp", "out", width=width)
    b.port("mlp.branch", f"{path}.ls_2", "out", width=width)
    b.port("block.out", path, "out", width=width, allows=allows)
