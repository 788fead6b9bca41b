"""Adapters in one block of a ViT: AdaptFormer, Pfeiffer, and LoRA in its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from golden_runners.golden_case import GoldenCase
from golden_runners.single_block import OneAttention, OneBlock, TokenBackbone
from peft_modal.attach import Adapter
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.methods.lora import LoRA
from peft_modal.methods.pfeiffer import Pfeiffer

LEARNED = {"learnable_scalar", "learnable", "learned"}
SITES = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "qkv": "attn.qkv", "proj": "attn.out"}


def adaptformer(case: GoldenCase) -> None:
    """A scaled ReLU bottleneck parallel to the MLP."""
    backbone = _block(case)
    norm = case.choice("layernorm_option", {option: option for option in ("none", "in", "out")})
    case.choice("activation", {"relu": "relu"}, default="relu")
    adapter = AdaptFormer(
        hidden_dim=case.setting("hidden"), scale=_scale(case), norm=norm, dropout=case.setting("dropout", 0.0)
    ).attach(backbone)
    if norm != "none":
        module = adapter.adapter.get_submodule("blocks.0.block.out")
        case.require("adapter_norm_eps", (module.before if norm == "in" else module.after).eps)
    case.setting("adapter_norm_eps", None)
    parts = {"before.": "norm.", "after.": "norm.", "scale.value": _scale_name(case)}

    def rename(name: str) -> str:
        name = name.removeprefix("adapter.blocks.0.block.out.")
        for ours, theirs in parts.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        return f"adapter.{name}"

    _run(case, backbone, adapter, rename)


def pfeiffer(case: GoldenCase) -> None:
    """A bottleneck with residual behind the MLP."""
    backbone = _block(case)
    names = {"gelu exact": "gelu", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
    activation = case.choice("activation", names, default="gelu")
    adapter = Pfeiffer(
        hidden_dim=case.setting("hidden"), activation=activation, dropout=case.setting("dropout", 0.0)
    ).attach(backbone)
    _run(case, backbone, adapter, lambda name: name.replace("adapter.blocks.0.mlp.out.", "mlp.adapter."))


def lora(case: GoldenCase) -> None:
    """Low-rank updates of row slices of a fused query-key-value linear."""
    dim, rank = case.setting("dim"), case.setting("rank")
    backbone = OneAttention(width=dim, num_heads=case.setting("num_heads"), qkv_bias="base.qkv.bias" in case)
    case.require("qkv_bias", "base.qkv.bias" in case)
    case.fill(backbone.network, lambda name: name.replace("attn.", "base.", 1))
    targets = case.setting("targets")
    unknown = [target for target in targets if target not in SITES]
    assert not unknown, f"{case.name}: targets {unknown} are unknown; known: {list(SITES)}"
    sites = [SITES[target] for target in targets]
    adapter = LoRA(
        sites=sites, rank=rank, alpha=rank * case.setting("scaling", 1.0), dropout=case.setting("dropout", 0.0)
    ).attach(backbone)

    def rename(name: str) -> str:
        site, _, factor = name.removeprefix("adapter.attn.").rpartition(".")
        path = site if site in {"qkv", "proj"} else f"qkv.{site}"
        return f"{path}.{ {'down': 'lora_a', 'up': 'lora_b'}[factor] }.weight"

    _run(case, backbone, adapter, rename)


def _block(case: GoldenCase) -> OneBlock:
    has_bias = "base.attn.qkv.bias" in case
    case.require("qkv_bias", has_bias)
    backbone = OneBlock(
        width=case.setting("dim"),
        num_heads=case.setting("num_heads"),
        mlp_ratio=case.setting("mlp_ratio"),
        qkv_bias=has_bias,
        norm_eps=case.setting("norm_eps", 1e-6),
        drop_path=case.setting("drop_path", 0.0),
    )
    case.fill(backbone.network, lambda name: name.replace("blocks.0.", "base.", 1))
    return backbone


def _scale(case: GoldenCase) -> Any:
    scale = case.setting("scale")
    if scale in LEARNED:
        return "learned"
    try:
        return float(scale)
    except ValueError:
        raise AssertionError(f"{case.name}: setting scale={scale!r} is unknown; known: numbers, {LEARNED}") from None


def _scale_name(case: GoldenCase) -> str:
    rest = [name for name in case.names("param.adapter.") if name.split(".")[0] not in {"down", "up", "norm"}]
    return rest[0] if rest else "scale"


def _run(case: GoldenCase, backbone: TokenBackbone, adapter: Adapter, rename: Callable[[str], str]) -> None:
    adapter.load(case.state(adapter.state(), lambda name: f"param.{rename(name)}"))
    case.choice("mode", {"eval": False}, default="eval")
    backbone.eval()
    adapter.eval()
    tokens = case.take("in.x").requires_grad_()
    y = backbone({"tokens": tokens}).tokens
    case.compare("out.y", y)
    y.backward(case.take("in.cotangent"))
    case.compare_gradient("x", tokens.grad)
    for name, parameter in adapter.named_trained().items():
        case.compare_gradient(rename(name), parameter.grad)
