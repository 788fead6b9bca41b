"""A tiny timm ViT with a linear head: SSF with its folded weights, and VPT in both forms."""

from __future__ import annotations

import torch
from tiny_backbones import TinyViT
from torch import Tensor

from golden_runners.golden_case import GoldenCase
from peft_modal.attach import merge_
from peft_modal.methods.ssf import SSF
from peft_modal.methods.vpt import VPT
from peft_modal_heads.linear import LinearHead

POOLS = {"cls": ["cls"], "token": ["cls"], "mean": ["mean"], "avg": ["mean"], "max": ["max"]}


def ssf(case: GoldenCase) -> None:
    """Scale and shift after every operation, their gradients, the folded weights and the folded network."""
    backbone = _backbone(case)
    adapter = SSF().attach(backbone)

    def rename(name: str) -> str:
        return name.removeprefix("adapter.")

    adapter.load(case.state(adapter.state(), lambda name: f"param.{rename(name)}"))
    if "ssf_param_count" in case.json:
        assert adapter.counts() == {"adapter": case.json["ssf_param_count"], "backbone": 0, "training_only": 0}
    head = _head(case, backbone)
    _run(case, backbone, head)
    for name, parameter in adapter.named_trained().items():
        case.compare_gradient(rename(name), parameter.grad)

    merge_(backbone)
    folded = backbone.network.state_dict()
    for name in case.names("out.merged."):
        case.compare(f"out.merged.{name}", folded.get(name))
    with torch.no_grad():
        case.compare("out.logits_merged", head(backbone({"image": case.take("in.x")})))


def vpt_shallow(case: GoldenCase) -> None:
    """Prompts that enter the first block and stay."""
    _vpt(case, deep=False)


def vpt_deep(case: GoldenCase) -> None:
    """Fresh prompts in every block."""
    _vpt(case, deep=True)


def _vpt(case: GoldenCase, *, deep: bool) -> None:
    backbone = _backbone(case)
    prompts = case.take("param.prompts")
    case.require("deep", deep)
    dropout = case.setting("prompt_dropout", 0.0)
    adapter = VPT(num_tokens=case.setting("num_tokens"), deep=deep, dropout=dropout).attach(backbone)
    adapter.load({f"adapter.blocks.prompt.{i}": own for i, own in enumerate(prompts)})
    _run(case, backbone, _head(case, backbone))
    gradients: list[Tensor] = [parameter.grad for parameter in adapter.named_trained().values()]
    case.compare_gradient("prompts", torch.stack(gradients))


def _backbone(case: GoldenCase) -> TinyViT:
    has_bias = "base.blocks.0.attn.qkv.bias" in case
    case.require("qkv_bias", has_bias)
    backbone = TinyViT(
        depth=case.setting("depth"),
        width=case.setting("embed_dim"),
        num_heads=case.setting("num_heads"),
        img_size=case.setting("img_size"),
        patch_size=case.setting("patch_size"),
        mlp_ratio=case.setting("mlp_ratio"),
        drop_path=case.setting("drop_path", 0.0),
        norm_eps=case.setting("norm_eps", 1e-6),
        qkv_bias=has_bias,
    )
    case.choice("mode", {"eval": False}, default="eval")
    case.fill(backbone.network, lambda name: f"base.{name}")
    return backbone


def _head(case: GoldenCase, backbone: TinyViT) -> LinearHead:
    pool = case.choice("pool", POOLS, default="cls")
    head = LinearHead(backbone.feature_spec(), case.setting("num_classes"), pool=pool)
    case.fill(head, lambda name: f"param.{name.replace('linear.', 'head.')}")
    return head.eval()


def _run(case: GoldenCase, backbone: TinyViT, head: LinearHead) -> None:
    backbone.eval()
    for adapter in backbone.adapters.values():
        adapter.eval()
    image = case.take("in.x").requires_grad_()
    logits = head(backbone({"image": image}))
    case.compare("out.logits", logits)
    logits.backward(case.take("in.cotangent"))
    case.compare_gradient("x", image.grad)
    for name, parameter in head.named_parameters():
        case.compare_gradient(name.replace("linear.", "head."), parameter.grad)
