"""Anatomies of timm's vision transformers: ViT (and DeiT, DINO, CLIP towers), EVA, Swin; and of ConvNeXt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_modal.anatomy import Anatomy, AnatomyBuilder, Segment, TokenLayout
from peft_modal.anatomy.sites import Access
from peft_modal.errors import ConfigError

STREAM: tuple[Access, ...] = ("read", "add", "replace", "tokens")
_NO_TOKENS: tuple[Access, ...] = ("read", "add", "replace")
_LINEAR_AND_NORM = (nn.Linear, nn.LayerNorm, nn.Conv2d)


def vit_anatomy(network: Any, *, always_trained: Sequence[str] = ()) -> Anatomy:  # noqa: ANN401 — one of timm's classes
    """Sites and ports of a `VisionTransformer` or an `Eva`, in order of execution.

    Raises:
        ConfigError: Its blocks are of a kind that has no anatomy here.
    """
    width = int(network.embed_dim)
    b = AnatomyBuilder(network)
    prefix = _embedding(b, network, width)
    for i, block in enumerate(network.blocks):
        describe_block(b, i, block, width=width)
    b.enter("blocks")
    b.port("final.norm.in", "norm", "in", width=width, allows=STREAM)
    norm(b, "norm", "norm", network.norm)
    b.port("final.norm.out", "norm", "out", width=width, allows=STREAM)
    norm(b, "norm.pooled", "fc_norm", network.fc_norm)
    is_rotary = getattr(network, "rope", None) is not None
    layout = TokenLayout(
        segments=(*prefix, Segment("patches", None)),
        body="grid",
        prompt_index=None if is_rotary else int(bool(prefix) and prefix[0].name == "cls"),
        reason="its rotary positions are counted out for the patches" if is_rotary else "",
    )
    return b.build(layouts={"blocks": layout}, always_trained=always_trained)


def _embedding(b: AnatomyBuilder, network: Any, width: int) -> tuple[Segment, ...]:  # noqa: ANN401
    """What stands before the blocks, and the tokens in front of the patches."""
    prefix = []
    for name, segment in (("cls_token", "cls"), ("dist_token", "dist"), ("reg_token", "registers")):
        token = getattr(network, name, None)
        if token is not None:
            b.raw(segment, name, decay=False)
            prefix.append(Segment(segment, int(token.shape[1])))
    if getattr(network, "pos_embed", None) is not None:
        b.raw("pos", "pos_embed")
    b.op("embed", "patch_embed.proj")
    if isinstance(network.patch_embed.norm, _LINEAR_AND_NORM):
        norm(b, "norm", "patch_embed.norm", network.patch_embed.norm)
    if not isinstance(network.norm_pre, nn.Identity):
        norm(b, "norm", "norm_pre", network.norm_pre)
    b.port("embed.out", "norm_pre", "out", width=width)
    return tuple(prefix)


def describe_block(
    b: AnatomyBuilder,
    index: int,
    block: Any,  # noqa: ANN401 — one of timm's classes
    *,
    width: int,
    prefix: str = "blocks",
    stack: str = "blocks",
) -> None:
    """Sites and ports of one pre-norm block, in order of execution.

    Raises:
        ConfigError: It is of another kind.
    """
    path = f"{prefix}.{index}"
    kind = type(block).__name__
    if kind not in {"Block", "EvaBlock", "DistilledBlock"}:
        raise ConfigError(f"backbone.model: its blocks are {kind}, for which there is no anatomy; choose another model")
    b.enter(stack, index)
    b.port("block.in", path, "in", width=width, allows=STREAM)
    norm(b, "norm", f"{path}.norm1", block.norm1)
    b.port("attn.norm.out", f"{path}.norm1", "out", width=width)
    _attention(b, f"{path}.attn", block.attn)
    b.port("attn.out", f"{path}.attn", "out", width=width)
    _layer_scale(b, block, path, "ls1", "gamma_1")
    b.port("attn.branch", f"{path}.drop_path1", "out", width=width)
    b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
    norm(b, "norm", f"{path}.norm2", block.norm2)
    b.port("mlp.norm.out", f"{path}.norm2", "out", width=width)
    _mlp(b, f"{path}.mlp", block.mlp)
    b.port("mlp.out", f"{path}.mlp", "out", width=width)
    _layer_scale(b, block, path, "ls2", "gamma_2")
    b.port("mlp.branch", f"{path}.drop_path2", "out", width=width)
    b.port("block.out", path, "out", width=width, allows=STREAM)


def _attention(b: AnatomyBuilder, path: str, attention: Any) -> None:  # noqa: ANN401
    heads = int(attention.num_heads)
    if attention.qkv is not None:
        parts = {role: f"{path}.{role.removeprefix('attn.')}" for role in ("attn.q", "attn.k", "attn.v")}
        biases = [name for name in ("q_bias", "k_bias", "v_bias") if getattr(attention, name, None) is not None]
        # EVA keeps biases of its own, and then reads the weight inside its attention.
        is_called = not biases or bool(getattr(attention, "qkv_bias_separate", False))
        b.fused(
            "attn.qkv", f"{path}.qkv", parts, heads=heads, called=is_called, owner=None if is_called else path,
            bias="bias" if is_called else None,
        )  # fmt: skip
        for name in biases:
            if name in dict(attention.named_parameters(recurse=False)):
                b.raw(f"bias.attn.{name[0]}", f"{path}.{name}", owner=path, called_owner=True)
    else:
        for part in ("q", "k", "v"):
            b.op(f"attn.{part}", f"{path}.{part}_proj", heads=heads)
    for name in ("q_norm", "k_norm", "norm"):
        module = getattr(attention, name, None)
        if module is not None and not isinstance(module, nn.Identity):
            norm(b, "norm.attn", f"{path}.{name}", module)
    if getattr(attention, "gate", None) is not None:
        b.op("attn.gate", f"{path}.gate")
    b.op("attn.out", f"{path}.proj")


def _mlp(b: AnatomyBuilder, path: str, mlp: Any) -> None:  # noqa: ANN401
    """Of one input layer, or of a gate and an input (SwiGLU)."""
    if hasattr(mlp, "fc1_g"):
        b.op("mlp.gate", f"{path}.fc1_g")
        b.op("mlp.in", f"{path}.fc1_x")
    else:
        b.op("mlp.in", f"{path}.fc1")
    inner = getattr(mlp, "norm", None)
    if inner is not None and not isinstance(inner, nn.Identity):
        norm(b, "norm.mlp", f"{path}.norm", inner)
    b.op("mlp.out", f"{path}.fc2")


def _layer_scale(b: AnatomyBuilder, block: Any, path: str, module: str, parameter: str) -> None:  # noqa: ANN401
    if hasattr(getattr(block, module, None), "gamma"):
        b.raw("layer_scale", f"{path}.{module}.gamma", owner=f"{path}.{module}", called_owner=True)
    elif getattr(block, parameter, None) is not None:
        b.raw("layer_scale", f"{path}.{parameter}", owner=path, called_owner=True)


def norm(b: AnatomyBuilder, role: str, path: str, module: nn.Module) -> None:
    """A norm of torch's or timm's; timm's own kinds are listed tensor by tensor."""
    if isinstance(module, nn.Identity):
        return
    if isinstance(module, nn.LayerNorm):
        # timm's LayerNorm over channels of pictures is one, too.
        b.op(role, path, out_dim=1 if "2d" in type(module).__name__ else None)
        return
    for tensor, part in (("weight", "scale"), ("bias", "shift")):
        if getattr(module, tensor, None) is not None:
            b.raw(f"{role}.{part}", f"{path}.{tensor}", owner=path, called_owner=True)


def swin_anatomy(network: Any) -> Anatomy:  # noqa: ANN401 — timm's class
    """Sites and ports of a `SwinTransformer`; blocks are numbered through its stages.

    The residual stream is (B, H, W, C) at a block's ends and (B, H * W, C) within its second half; attention sees
    windows.
    """
    b = AnatomyBuilder(network)
    b.op("embed", "patch_embed.proj")
    norm(b, "norm", "patch_embed.norm", network.patch_embed.norm)
    index = 0
    for stage, layer in enumerate(network.layers):
        b.enter("blocks")
        if not isinstance(layer.downsample, nn.Identity):
            norm(b, "norm.merge", f"layers.{stage}.downsample.norm", layer.downsample.norm)
            b.op("merge", f"layers.{stage}.downsample.reduction")
        for number, block in enumerate(layer.blocks):
            _swin_block(b, index, f"layers.{stage}.blocks.{number}", block)
            index += 1
    b.enter("blocks")
    width = int(network.num_features)
    b.port("final.norm.in", "norm", "in", width=width, allows=_NO_TOKENS)
    norm(b, "norm", "norm", network.norm)
    b.port("final.norm.out", "norm", "out", width=width, allows=_NO_TOKENS)
    layout = TokenLayout(
        segments=(Segment("patches", None),),
        body="windows",
        reason="its blocks attend within windows, which have no room",
    )
    return b.build(layouts={"blocks": layout})


def _swin_block(b: AnatomyBuilder, index: int, path: str, block: Any) -> None:  # noqa: ANN401
    width = int(block.dim)
    b.enter("blocks", index)
    b.port("block.in", path, "in", width=width, allows=_NO_TOKENS)
    norm(b, "norm", f"{path}.norm1", block.norm1)
    b.port("attn.norm.out", f"{path}.norm1", "out", width=width)
    b.raw("pos.relative", f"{path}.attn.relative_position_bias_table", owner=f"{path}.attn", called_owner=True)
    parts = {role: f"{path}.attn.{role.removeprefix('attn.')}" for role in ("attn.q", "attn.k", "attn.v")}
    b.fused("attn.qkv", f"{path}.attn.qkv", parts, heads=int(block.attn.num_heads))
    b.op("attn.out", f"{path}.attn.proj")
    b.port("attn.out", f"{path}.attn", "out", width=width)
    b.port("attn.branch", f"{path}.drop_path1", "out", width=width)
    b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
    norm(b, "norm", f"{path}.norm2", block.norm2)
    b.port("mlp.norm.out", f"{path}.norm2", "out", width=width)
    _mlp(b, f"{path}.mlp", block.mlp)
    b.port("mlp.out", f"{path}.mlp", "out", width=width)
    b.port("mlp.branch", f"{path}.drop_path2", "out", width=width)
    b.port("block.out", path, "out", width=width, allows=_NO_TOKENS)


def convnext_anatomy(network: Any) -> Anatomy:  # noqa: ANN401 — timm's class
    """Sites and ports of a `ConvNeXt`; blocks are numbered through its stages.

    The residual stream is (B, C, H, W). Within a block's MLP channels are last, but for the variants whose MLP is made
    of 1x1 convolutions.
    """
    b = AnatomyBuilder(network)
    b.op("embed", "stem.0")
    for number, module in enumerate(list(network.stem)[1:], start=1):
        if isinstance(module, nn.Conv2d):
            b.op("embed", f"stem.{number}")
        else:
            norm(b, "norm", f"stem.{number}", module)
    index = 0
    for stage, layer in enumerate(network.stages):
        b.enter("blocks")
        if not isinstance(layer.downsample, nn.Identity):
            for number, module in enumerate(layer.downsample):
                if isinstance(module, nn.Conv2d):
                    b.op("conv.downsample", f"stages.{stage}.downsample.{number}")
                else:
                    norm(b, "norm.downsample", f"stages.{stage}.downsample.{number}", module)
        for number, block in enumerate(layer.blocks):
            _convnext_block(b, index, f"stages.{stage}.blocks.{number}", block)
            index += 1
    b.enter("blocks")
    norm(b, "norm", "norm_pre", network.norm_pre)
    b.port("final.out", "norm_pre", "out", width=int(network.num_features), channel_dim=1)
    norm(b, "norm.pooled", "head.norm", getattr(network.head, "norm", nn.Identity()))
    return b.build(layouts={})


def _convnext_block(b: AnatomyBuilder, index: int, path: str, block: Any) -> None:  # noqa: ANN401
    width = int(block.conv_dw.out_channels)
    inner = 1 if block.use_conv_mlp else -1
    b.enter("blocks", index)
    if isinstance(block.shortcut, nn.Identity):
        b.port("block.in", path, "in", width=width, channel_dim=1)
    b.op("conv", f"{path}.conv_dw")
    norm(b, "norm", f"{path}.norm", block.norm)
    b.port("mlp.norm.in", f"{path}.norm", "in", width=width, channel_dim=inner)
    b.port("mlp.norm.out", f"{path}.norm", "out", width=width, channel_dim=inner)
    b.op("mlp.in", f"{path}.mlp.fc1")
    if hasattr(block.mlp, "grn"):
        for tensor, part in (("weight", "scale"), ("bias", "shift")):
            b.raw(f"norm.mlp.{part}", f"{path}.mlp.grn.{tensor}", owner=f"{path}.mlp.grn", called_owner=True)
    b.op("mlp.out", f"{path}.mlp.fc2")
    b.port("mlp.out", f"{path}.mlp", "out", width=width, channel_dim=inner)
    if block.gamma is not None:
        b.raw("layer_scale", f"{path}.gamma", owner=path, called_owner=True)
    b.port("mlp.branch", f"{path}.drop_path", "out", width=width, channel_dim=1)
    b.port("block.out", path, "out", width=width, channel_dim=1)
