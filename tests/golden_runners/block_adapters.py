"""Adapters in blocks of a ViT: bottlenecks, bypasses, FacT, and LoRA in its attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from golden_runners.golden_case import GoldenCase
from golden_runners.single_block import BareBlocks, OneAttention, TokenBackbone
from peft_modal.attach import Adapter
from peft_modal.attach.merge import merge_
from peft_modal.attach.operations import Operation
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.methods.bi_adaptformer import BiAdaptFormer
from peft_modal.methods.bi_lora import BiLoRA
from peft_modal.methods.convpass import Convpass
from peft_modal.methods.fact import FacT
from peft_modal.methods.lora import LoRA
from peft_modal.methods.pfeiffer import Pfeiffer
from peft_modal.methods.repadapter import RepAdapter

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
        module = adapter.adapter.get_submodule("blocks.0.mlp.branch")
        case.require("adapter_norm_eps", (module.before if norm == "in" else module.after).eps)
    case.setting("adapter_norm_eps", None)
    parts = {"before.": "norm.", "after.": "norm.", "scale.value": _scale_name(case)}

    def rename(name: str) -> str:
        name = name.removeprefix("adapter.blocks.0.mlp.branch.")
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


def bi_adaptformer(case: GoldenCase) -> None:
    """A bottleneck of few bits beside the MLP."""
    backbone = _block(case)
    adapter = BiAdaptFormer(
        hidden_dim=case.setting("hidden"), bits=case.setting("bits"), scale=_scale(case), dropout=0.0
    ).attach(backbone)
    _run(case, backbone, adapter, lambda name: name.replace("adapter.blocks.0.mlp.branch.", "adapter."))


def bi_lora(case: GoldenCase) -> None:
    """Low-rank updates of few bits of the queries and values."""
    backbone = _block(case)
    adapter = BiLoRA(
        hidden_dim=case.setting("hidden"), bits=case.setting("bits"), scale=_scale(case), dropout=0.0
    ).attach(backbone)
    _run(case, backbone, adapter, lambda name: name.replace("adapter.blocks.0.", ""))


def convpass(case: GoldenCase) -> None:
    """Convolutional bottlenecks beside attention and the MLP."""
    height, width = case.setting("grid")
    backbone = _block(case, prefix_tokens=case.setting("prefix_tokens", 1), grid=(height, width))
    quick = {"quick gelu x*sigmoid(1.702x)": "quick", "quick gelu": "quick", "quick_gelu": "quick"}
    case.choice("activation", quick, default="quick_gelu")
    halves = [half for half in ("attn", "mlp") if case.names(f"param.{half}.convpass.")]
    places = {("attn", "mlp"): "both", ("attn",): "attention", ("mlp",): "mlp"}[tuple(halves)]
    adapter = Convpass(hidden_dim=case.setting("hidden"), scale=_scale(case), places=places).attach(backbone)

    def rename(name: str) -> str:
        return re.sub(r"^adapter\.blocks\.0\.(attn|mlp)\.branch\.", r"\1.convpass.", name)

    _run(case, backbone, adapter, rename)


def repadapter(case: GoldenCase) -> None:
    """Linear bottlenecks before attention and before the MLP, and what they fold into."""
    backbone = _block(case)
    adapter = RepAdapter(hidden_dim=case.setting("hidden"), groups=case.setting("groups"), scale=_scale(case)).attach(
        backbone
    )

    def rename(name: str) -> str:
        part = "attn" if ".attn." in name else "mlp"
        return f"{part}.rep.{name.partition('.bottleneck.')[2]}"

    adapter.load(case.state(adapter.state(), lambda name: f"param.{rename(name)}"))
    for path in ("attn.qkv", "mlp.fc1"):
        _undo_merge(case, path, backbone.network.get_submodule(f"blocks.0.{path}"), adapter)
    _run(case, backbone, adapter, rename)
    merge_(backbone)
    for name, tensor in backbone.network.state_dict().items():
        case.compare(f"out.merged.{name.removeprefix('blocks.0.')}", tensor)


def _undo_merge(case: GoldenCase, path: str, linear: nn.Module, adapter: Adapter) -> None:
    """Give a linear the weights from before the authors' merge, which changed them in place before they were stored."""
    weight, bias = case.take(f"base.{path}.weight"), case.take(f"base.{path}.bias")
    if not torch.equal(weight, case.tensors[f"out.merged.{path}.weight"]):
        return
    operation: Operation = adapter.adapter.get_submodule(f"blocks.0.{path}")
    with torch.no_grad():
        folds_into = operation.fold_weight(torch.eye(weight.shape[1], dtype=torch.float64))
        before = torch.linalg.solve(folds_into.T, weight.double().T).T
        shift = operation.fold_bias(before, torch.zeros(len(before), dtype=torch.float64))
        linear.weight.copy_(before)
        linear.bias.copy_(bias - shift)


def fact(case: GoldenCase) -> None:
    """Shared factors over a stack of blocks."""
    backbone = _blocks(case, prefix="base.blocks.", depth=case.setting("depth"))
    form = {"fact-tt": "tt", "fact-tk": "tk"}[case.slug]
    adapter = FacT(form=form, rank=case.setting("rank"), scale=_scale(case)).attach(backbone)
    linears = {"u": "u.weight", "v": "v.weight"}

    def rename(name: str) -> str:
        if name.startswith("adapter.fact."):
            tensor = name.removeprefix("adapter.fact.")
            return f"fact.{linears.get(tensor, tensor)}"
        site = name.removeprefix("adapter.").removesuffix(".sigma")
        return f"{site}.fact.sigma.weight"

    _run(case, backbone, adapter, rename)


def _block(case: GoldenCase, **options: Any) -> BareBlocks:
    return _blocks(case, prefix="base.", depth=1, **options)


def _blocks(case: GoldenCase, *, prefix: str, depth: int, **options: Any) -> BareBlocks:
    """Blocks with the case's own weights; of several the number stands behind the prefix."""
    first = prefix if prefix == "base." else f"{prefix}0."
    has_bias = f"{first}attn.qkv.bias" in case
    case.require("qkv_bias", has_bias)
    backbone = BareBlocks(
        width=case.setting("dim"),
        num_heads=case.setting("num_heads"),
        mlp_ratio=case.setting("mlp_ratio"),
        qkv_bias=has_bias,
        norm_eps=case.setting("norm_eps", 1e-6),
        drop_path=case.setting("drop_path", 0.0),
        depth=depth,
        **options,
    )
    case.fill(backbone.network, lambda name: name.replace("blocks.0." if prefix == "base." else "blocks.", prefix, 1))
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
    state = case.state(adapter.state(training_only=True), lambda name: f"param.{rename(name)}")
    adapter.load(state, training_only=True)
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
