"""The anatomy of the one-stream tracker: that of the vision modality's ViT, with two pictures in its sequence."""

from __future__ import annotations

from torch import nn

from peft_modal.anatomy import Anatomy, AnatomyBuilder, Segment, TokenLayout
from peft_modal_tracking.network import OneStreamViT
from peft_modal_vision.anatomy import STREAM, describe_block, norm


def tracker_anatomy(network: OneStreamViT) -> Anatomy:
    """Sites and ports in order of execution; the template's tokens stand before those of the search picture.

    The type embedding, which no pre-trained file holds, is trained by every method.
    """
    width = network.embed_dim
    b = AnatomyBuilder(network)
    b.raw("pos", "pos_embed", decay=False)
    b.raw("type", "token_type_embed", decay=False)
    b.op("embed", "patch_embed.proj")
    norm(b, "norm", "patch_embed.norm", network.patch_embed.norm)
    if not isinstance(network.norm_pre, nn.Identity):
        norm(b, "norm", "norm_pre", network.norm_pre)
    b.port("embed.out", "norm_pre", "out", width=width)
    for i, block in enumerate(network.blocks):
        describe_block(b, i, block, width=width)
    b.enter("blocks")
    b.port("final.norm.in", "norm", "in", width=width, allows=STREAM)
    norm(b, "norm", "norm", network.norm)
    b.port("final.norm.out", "norm", "out", width=width, allows=STREAM)
    template = Segment("template", network.template_grid[0] * network.template_grid[1])
    layout = TokenLayout(segments=(template, Segment("search", None)), body="grid", prompt_index=0)
    return b.build(layouts={"blocks": layout}, always_trained=("token_type_embed",))
