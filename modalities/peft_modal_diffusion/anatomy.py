"""Anatomies of Stable Diffusion's parts: the U-Net, the transformer of SD 3, and CLIP's text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_modal.anatomy import AnatomyBuilder, Segment, TokenLayout
from peft_modal.anatomy.sites import Access

READ_ADD: tuple[Access, ...] = ("read", "add", "replace")


def describe_unet(b: AnatomyBuilder, unet: Any, path: str = "unet") -> None:  # noqa: ANN401 — diffusers' own class
    """Sites and ports of a `UNet2DConditionModel` in order of execution.

    Blocks are the transformer blocks, numbered through each of the stacks `unet.down`, `unet.mid` and `unet.up`;
    `attn` is self-attention, `cross` attention to the text.
    """
    b.enter("unet")
    for name, role in (("conv_in", "conv"), ("time_embedding.linear_1", "time"), ("time_embedding.linear_2", "time")):
        b.op(role, f"{path}.{name}")
    if getattr(unet, "add_embedding", None) is not None:
        b.op("time.add", f"{path}.add_embedding.linear_1")
        b.op("time.add", f"{path}.add_embedding.linear_2")
    stages = [
        *(("unet.down", f"{path}.down_blocks.{i}", stage) for i, stage in enumerate(unet.down_blocks)),
        ("unet.mid", f"{path}.mid_block", unet.mid_block),
        *(("unet.up", f"{path}.up_blocks.{i}", stage) for i, stage in enumerate(unet.up_blocks)),
    ]
    numbers = dict.fromkeys(("unet.down", "unet.mid", "unet.up"), 0)
    for stack, place, stage in stages:
        numbers[stack] = _stage(b, stack, place, stage, first=numbers[stack])
    b.enter("unet")
    if unet.conv_norm_out is not None:
        b.op("norm", f"{path}.conv_norm_out")
    b.op("conv", f"{path}.conv_out")


def _stage(b: AnatomyBuilder, stack: str, path: str, stage: Any, *, first: int) -> int:  # noqa: ANN401
    """One resolution; gives the number of its stack's next transformer block."""
    attentions = list(getattr(stage, "attentions", ()))
    for i, resnet in enumerate(stage.resnets):
        b.enter(stack)
        _resnet(b, f"{path}.resnets.{i}", resnet)
        # The middle block has one resnet more than attentions: resnet, attention, resnet.
        if i < len(attentions):
            place, attention = f"{path}.attentions.{i}", attentions[i]
            projection = "linear" if isinstance(attention.proj_in, nn.Linear) else "conv"
            b.op("norm", f"{place}.norm")
            b.op(f"proj.in.{projection}", f"{place}.proj_in")
            for j in range(len(attention.transformer_blocks)):
                _transformer_block(b, stack, first, f"{place}.transformer_blocks.{j}", attention.transformer_blocks[j])
                first += 1
            b.enter(stack)
            b.op(f"proj.out.{projection}", f"{place}.proj_out")
    for kind in ("downsamplers", "upsamplers"):
        for i, sampler in enumerate(getattr(stage, kind, None) or ()):
            if getattr(sampler, "conv", None) is not None:
                b.op("conv.resample", f"{path}.{kind}.{i}.conv")
    return first


def _resnet(b: AnatomyBuilder, path: str, resnet: Any) -> None:  # noqa: ANN401
    b.op("norm", f"{path}.norm1")
    b.op("conv.in", f"{path}.conv1")
    b.op("time.proj", f"{path}.time_emb_proj")
    b.op("norm", f"{path}.norm2")
    b.op("conv.out", f"{path}.conv2")
    if resnet.conv_shortcut is not None:
        b.op("conv.shortcut", f"{path}.conv_shortcut")


def _transformer_block(b: AnatomyBuilder, stack: str, index: int, path: str, block: Any) -> None:  # noqa: ANN401
    b.enter(stack, index)
    width = block.norm1.normalized_shape[0]
    b.port("block.in", path, "in", width=width, allows=READ_ADD)
    for norm, attention, role in (("norm1", "attn1", "attn"), ("norm2", "attn2", "cross")):
        b.op("norm", f"{path}.{norm}")
        b.port(f"{role}.norm.out", f"{path}.{norm}", "out", width=width)
        heads = getattr(block, attention).heads
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            b.op(f"{role}.{part}", f"{path}.{attention}.{name}", heads=heads)
        b.port(f"{role}.out", f"{path}.{attention}", "out", width=width)
    b.port("mlp.norm.in", f"{path}.norm3", "in", width=width)
    b.op("norm", f"{path}.norm3")
    b.port("mlp.norm.out", f"{path}.norm3", "out", width=width)
    b.op("mlp.in", f"{path}.ff.net.0.proj")
    b.op("mlp.out", f"{path}.ff.net.2")
    b.port("mlp.out", f"{path}.ff", "out", width=width)
    b.port("block.out", path, "out", width=width, allows=READ_ADD)


def describe_joint_transformer(b: AnatomyBuilder, transformer: Any, path: str = "transformer") -> None:  # noqa: ANN401
    """Sites and ports of an `SD3Transformer2DModel`.

    Image and text have weights of their own in each block: `attn.q` is the image's, `context.q` the text's; the second
    attention of SD 3.5's blocks is `attn2`. `mod` are the projections of the time step that shift, scale and gate.
    Ports lie on the image's stream; norms have no tensors of their own, so `*.norm.out` is what `mod` makes of them.
    There is no `block.in`: diffusers gives it by name, but by position to a block that it computes again.
    """
    b.enter("transformer")
    b.op("embed", f"{path}.pos_embed.proj")
    for name in ("timestep_embedder", "text_embedder"):
        for layer in ("linear_1", "linear_2"):
            b.op("time" if name == "timestep_embedder" else "time.add", f"{path}.time_text_embed.{name}.{layer}")
    b.op("embed.context", f"{path}.context_embedder")
    for i in range(len(transformer.transformer_blocks)):
        _joint_block(b, i, f"{path}.transformer_blocks.{i}", transformer.transformer_blocks[i])
    b.enter("transformer")
    b.op("mod", f"{path}.norm_out.linear")
    b.op("proj.out", f"{path}.proj_out")


_IMAGE = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"))
_TEXT = (("q", "add_q_proj"), ("k", "add_k_proj"), ("v", "add_v_proj"))


def _joint_block(b: AnatomyBuilder, index: int, path: str, block: Any) -> None:  # noqa: ANN401
    b.enter("transformer", index)
    width = block.attn.to_q.in_features
    heads = block.attn.heads
    b.op("mod", f"{path}.norm1.linear")
    b.op("context.mod", f"{path}.norm1_context.linear")
    b.port("attn.norm.out", f"{path}.attn", "in", width=width, item="hidden_states")
    _attention_inputs(b, "attn", f"{path}.attn", block.attn, _IMAGE, ("norm_q", "norm_k"), heads)
    _attention_inputs(b, "context", f"{path}.attn", block.attn, _TEXT, ("norm_added_q", "norm_added_k"), heads)
    b.op("attn.out", f"{path}.attn.to_out.0", heads=heads)
    if block.attn.context_pre_only is False and getattr(block.attn, "to_add_out", None) is not None:
        b.op("context.out", f"{path}.attn.to_add_out", heads=heads)
    b.port("attn.out", f"{path}.attn", "out", width=width, item=0)
    if block.attn2 is not None:
        _attention_inputs(b, "attn2", f"{path}.attn2", block.attn2, _IMAGE, ("norm_q", "norm_k"), heads)
        b.op("attn2.out", f"{path}.attn2.to_out.0", heads=heads)
        b.port("attn2.out", f"{path}.attn2", "out", width=width)
    b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
    b.port("mlp.norm.out", f"{path}.ff", "in", width=width)
    b.op("mlp.in", f"{path}.ff.net.0.proj")
    b.op("mlp.out", f"{path}.ff.net.2")
    b.port("mlp.out", f"{path}.ff", "out", width=width)
    if block.ff_context is not None:
        b.op("context.mlp.in", f"{path}.ff_context.net.0.proj")
        b.op("context.mlp.out", f"{path}.ff_context.net.2")
        b.port("context.mlp.out", f"{path}.ff_context", "out", width=width)
    b.port("block.out", path, "out", width=width, item=1, allows=READ_ADD)


def _attention_inputs(
    b: AnatomyBuilder, role: str, path: str, attention: Any, parts: Sequence[tuple[str, str]],  # noqa: ANN401
    norms: Sequence[str], heads: int,
) -> None:  # fmt: skip
    for part, name in parts:
        if getattr(attention, name, None) is not None:
            b.op(f"{role}.{part}", f"{path}.{name}", heads=heads)
    for name in norms:
        if getattr(attention, name, None) is not None:
            # diffusers' own RMSNorm.
            b.raw("norm.qk.scale", f"{path}.{name}.weight", owner=f"{path}.{name}", called_owner=True)


def describe_text_encoder(b: AnatomyBuilder, encoder: Any, path: str, stack: str, *, penultimate: bool) -> None:  # noqa: ANN401
    """Sites and ports of a `CLIPTextModel`, with projection or without.

    Args:
        b: Where they are added.
        encoder: The encoder.
        path: Its place in the network.
        stack: Name of its stack.
        penultimate: Only the states before the last layer are used, so what lies behind has no site.
    """
    body = f"{path}.text_model" if hasattr(encoder, "text_model") else path
    inner = encoder.get_submodule("text_model") if hasattr(encoder, "text_model") else encoder
    width = int(encoder.config.hidden_size)
    b.enter(stack)
    b.op("embed.token", f"{body}.embeddings.token_embedding")
    b.op("embed.pos", f"{body}.embeddings.position_embedding")
    for i in range(len(inner.encoder.layers) - penultimate):
        place = f"{body}.encoder.layers.{i}"
        heads = int(encoder.config.num_attention_heads)
        b.enter(stack, i)
        b.port("block.in", place, "in", width=width, allows=READ_ADD)
        b.op("norm", f"{place}.layer_norm1")
        b.port("attn.norm.out", f"{place}.layer_norm1", "out", width=width)
        for part in ("q", "k", "v", "out"):
            b.op(f"attn.{part}", f"{place}.self_attn.{part}_proj", heads=heads)
        b.port("attn.out", f"{place}.self_attn", "out", width=width, item=0)
        b.port("mlp.norm.in", f"{place}.layer_norm2", "in", width=width)
        b.op("norm", f"{place}.layer_norm2")
        b.port("mlp.norm.out", f"{place}.layer_norm2", "out", width=width)
        b.op("mlp.in", f"{place}.mlp.fc1")
        b.op("mlp.out", f"{place}.mlp.fc2")
        b.port("mlp.out", f"{place}.mlp", "out", width=width)
        b.port("block.out", place, "out", width=width, allows=READ_ADD)
    b.enter(stack)
    if penultimate:
        return
    b.op("norm", f"{body}.final_layer_norm")
    if getattr(encoder, "text_projection", None) is not None:
        b.op("proj", f"{path}.text_projection")


def text_layout() -> TokenLayout:
    """A text encoder's sequence: its length is fixed by the positions, so it takes no prompts."""
    return TokenLayout(
        segments=(Segment("text", None),), body="sequence", prompt_index=None,
        reason="the causal mask and the positions have a fixed length",
    )  # fmt: skip
