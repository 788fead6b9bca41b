"""PETL-AST: adapters in every place of a block, the convolutional one, LoRA, prefixes, prompts and mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from golden_runners.golden_case import GoldenCase
from golden_runners.single_block import BareBlocks, OneAttention
from peft_modal.attach import Adapter
from peft_modal.methods.bottleneck import Bottleneck
from peft_modal.methods.compose import Compose
from peft_modal.methods.houlsby import Houlsby
from peft_modal.methods.lora import LoRA
from peft_modal.methods.norm_tuning import NormTuning
from peft_modal.methods.pfeiffer import Pfeiffer
from peft_modal.methods.prefix import Prefix
from peft_modal.methods.vpt import VPT
from peft_modal_audio.backbone import AST
from peft_modal_audio.conformer import ConformerBottleneck
from peft_modal_audio.mixture import DenseMixture, SoftMixture
from peft_modal_heads.linear import LinearHead

FORMS: dict[str, dict[str, Any]] = {
    "parallel": {"form": "parallel"},
    "parallel_residual": {"form": "parallel", "residual": True},
    "sequential": {"form": "sequential", "residual": False},
    "sequential_residual": {"form": "sequential"},
}
PLACES: dict[str, dict[str, Any]] = {
    "parallel_before": {"form": "parallel"},
    "parallel_after": {"form": "sequential"},
    "sequential_before": {"form": "input"},
    "sequential_after": {"form": "sequential"},
}
POOLS = {
    "all": "mean.all",
    "cls": "cls",
    "prompts": "mean.prompts",
    "speech": "mean.patches",
    "prompts_speech": "mean.prompts+patches",
}
_ACTIVATION = "gelu (erf) in the block and in the bottleneck adapter"


def houlsby(case: GoldenCase) -> None:
    """Bottlenecks for attention and MLP, four ways."""
    case.require("placement", "after attention and MLP")
    _forms(case, Houlsby)


def pfeiffer(case: GoldenCase) -> None:
    """A bottleneck for the MLP, four ways."""
    case.require("placement", "MLP only")
    _forms(case, Pfeiffer)


def placements(case: GoldenCase) -> None:
    """One bottleneck in eight places."""
    for half in ("attn", "mlp"):
        for place, options in PLACES.items():
            backbone = _block(case)
            adapter = Pfeiffer(hidden_dim=_rank(case), place=half, **options).attach(backbone)  # type: ignore[arg-type]
            _fill(case, adapter, lambda name: f"param.adapter.{'.'.join(name.split('.')[-2:])}")
            with torch.no_grad():
                case.compare(f"out.{half}_{place}", backbone({"tokens": case.take("in.x")}).tokens)


def _forms(case: GoldenCase, method: type[Houlsby] | type[Pfeiffer]) -> None:
    for form, options in FORMS.items():
        backbone = _block(case)
        adapter = method(hidden_dim=_rank(case), train_norms=True, **options).attach(backbone)

        def rename(name: str) -> str:
            if name.startswith("backbone.blocks.0."):
                return f"block.{name.removeprefix('backbone.blocks.0.')}"
            half = "attn" if ".attn." in name else "mlp"
            return f"adapter_{half}.{'.'.join(name.split('.')[-2:])}"

        _fill(case, adapter, lambda name: f"param.{rename(name)}")
        x = case.take("in.x").requires_grad_()
        y = backbone({"tokens": x}).tokens
        case.compare(f"out.{form}", y)
        if form == "parallel":
            torch.sum(y * case.take("in.loss_weight")).backward()
            case.compare_gradient("x", x.grad)
            for name, parameter in adapter.named_trained().items():
                case.compare_gradient(rename(name), parameter.grad)


def _block(case: GoldenCase) -> BareBlocks:
    dim = case.setting("dim")
    case.require("act", _ACTIVATION)
    backbone = BareBlocks(
        width=dim, num_heads=case.setting("heads"), mlp_ratio=case.setting("mlp_hidden") / dim, qkv_bias=True,
        norm_eps=case.setting("norm_eps"),
    )  # fmt: skip
    case.fill(backbone.network, lambda name: name.replace("blocks.0.", "param.block."))
    return backbone


def _rank(case: GoldenCase) -> int:
    case.require("reduction_rate", case.setting("dim") // case.setting("rank"))
    return case.setting("rank")


def _fill(case: GoldenCase, adapter: Adapter, rename: Callable[[str], str]) -> None:
    adapter.load(case.state(adapter.state(), rename))
    adapter.eval()


def conformer(case: GoldenCase) -> None:
    """The convolutional bottleneck in both modes, and what its BatchNorm remembers."""
    module = ConformerBottleneck(
        case.setting("dim"), hidden_dim=_rank(case), kernel=case.setting("kernel"), dropout=case.setting("dropout")
    )
    case.require("bn_eps", module.norm.eps)
    case.require("bn_momentum", module.norm.momentum)
    case.fill(module, lambda name: f"param.{name}")
    module.norm.num_batches_tracked.copy_(case.take("param.norm.num_batches_tracked"))  # type: ignore[union-attr]
    with torch.no_grad():
        case.compare("out.eval", module.eval()(case.take("in.x")))
    x = case.take("in.x").requires_grad_()
    y = module.train()(x)
    case.compare("out.train", y)
    torch.sum(y * case.take("in.loss_weight")).backward()
    case.compare_gradient("x", x.grad)
    for name, parameter in module.named_parameters():
        case.compare_gradient(name, parameter.grad)
    for name, buffer in module.norm.named_buffers():
        case.compare(f"out.norm_{name}", buffer)


def lora(case: GoldenCase) -> None:
    """Low-rank updates of queries and values, scaled by the reduction rate."""
    case.setting("note", "")
    rank, scale = _rank(case), case.setting("alpha") / case.setting("reduction_rate")
    case.require("scaling", scale)
    backbone = _attention(case)
    adapter = LoRA(rank=rank, alpha=rank * scale).attach(backbone)
    _attend(case, backbone, adapter, lambda name: f"{name.removeprefix('adapter.attn.')}.weight")


def prefix(case: GoldenCase) -> None:
    """Keys and values behind the class token's."""
    count = case.setting("tokens_per_side")
    case.require("num_tokens", 2 * count)
    backbone = _attention(case)
    adapter = Prefix(num_tokens=count).attach(backbone)
    _attend(case, backbone, adapter, lambda name: name.rpartition(".")[2])


def _attention(case: GoldenCase) -> OneAttention:
    """An attention whose output projection is the identity, so that the context can be seen."""
    backbone = OneAttention(width=case.setting("dim"), num_heads=case.setting("heads"), qkv_bias=True, prefix_tokens=1)
    attention: Any = backbone.network.get_submodule("attn")
    case.fill(attention.qkv, lambda name: f"param.attn.qkv.{name}")
    nn.init.eye_(attention.proj.weight)
    nn.init.zeros_(attention.proj.bias)
    return backbone


def _attend(case: GoldenCase, backbone: OneAttention, adapter: Adapter, rename: Callable[[str], str]) -> None:
    _fill(case, adapter, lambda name: f"param.{rename(name)}")
    x = case.take("in.x").requires_grad_()
    y = backbone({"tokens": x}).tokens
    case.compare("out.context", y)
    torch.sum(y * case.take("in.loss_weight")).backward()
    case.compare_gradient("x", x.grad)
    for name, parameter in adapter.named_trained().items():
        case.compare_gradient(rename(name), parameter.grad)


def prompts(case: GoldenCase) -> None:
    """Prompts in a whole network without a distillation token, deep and shallow, read in five ways."""
    case.require("sequence", "[cls, prompts, patches]: the distillation token is dropped")
    for deep in (True, False):
        for pool, name in POOLS.items():
            backbone = AST(
                model="custom",
                weights="random",
                distillation_token=False,
                sizes={
                    "width": case.setting("dim"), "depth": case.setting("depth"), "heads": case.setting("heads"),
                    "mlp_width": case.setting("mlp_hidden"), "mels": case.setting("mel"),
                    "frames": case.setting("frames"), "norm_eps": case.setting("norm_eps"),
                },
            )  # fmt: skip
            case.fill(backbone.network, lambda key: f"param.{key}")
            method = VPT(num_tokens=case.setting("prompts"), deep=deep, export=True)
            adapter = Compose(methods=[method, NormTuning(sites={"path": r"^norm(\.shift)?$"})]).attach(backbone)

            def rename(key: str) -> str:
                if key.startswith("backbone."):
                    return key.partition(".1_norm_tuning.")[2]
                return f"prompts.{key.rpartition('.')[2]}"

            _fill(case, adapter, lambda key: f"param.{rename(key)}")
            head = LinearHead(backbone.feature_spec(), case.setting("classes"), pool=[name])
            case.fill(head, lambda key: f"param.{key.replace('linear.', 'head.')}")
            logits = head(backbone({"spectrogram": case.take("in.spectrogram")}))
            kind = f"{'deep' if deep else 'shallow'}_{pool}"
            case.compare(f"out.logits_{kind}", logits)
            if kind == "deep_all":
                torch.sum(logits * case.take("in.loss_weight")).backward()
                for key, parameter in adapter.named_trained().items():
                    case.compare_gradient(rename(key), parameter.grad)
                case.compare_gradient("head.weight", head.linear.weight.grad)


def mixtures(case: GoldenCase) -> None:
    """Soft mixtures, plain and normalised as released, and a dense one."""
    width, rank, count, slots = (case.setting("dim"), _rank(case), case.setting("experts"), case.setting("slots"))
    assert case.setting("l2_eps") == 1e-6

    def experts() -> list[Bottleneck]:
        return [Bottleneck(width, hidden_dim=rank) for _ in range(count)]

    mixes: dict[str, nn.Module] = {
        "soft": SoftMixture(width, experts(), slots=slots),
        "soft_normalised": SoftMixture(width, experts(), slots=slots, normalised_axis=1),
        "dense": DenseMixture(width, experts()),
    }
    for kind, module in mixes.items():
        case.fill(module, lambda name: f"param.{name}")
        x = case.take("in.x").requires_grad_()
        y: Tensor = module(x)
        case.compare(f"out.{kind}", y)
        torch.sum(y * case.take("in.loss_weight")).backward()
        case.compare(f"grad.{kind}.x", x.grad)
        for name, parameter in module.named_parameters():
            case.compare(f"grad.{kind}.{name}", parameter.grad)
