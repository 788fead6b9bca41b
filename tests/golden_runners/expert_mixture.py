"""A mixture of sparse adapters in one block: splits, one routed pass, masked gradients, and the merged adapter."""

from __future__ import annotations

import re

import torch

from golden_runners.golden_case import GoldenCase
from golden_runners.single_block import BareBlocks
from peft_modal.methods.mosa import ExpertLinear, MixtureBottleneck, MoSA, Split, owners, symmetric_divergence

_NAMES = {
    "norm1": "attention_norm", "norm2": "ffn_norm", "attn.proj": "attn.out", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2",
}  # fmt: skip


def mosa(case: GoldenCase) -> None:
    """Two forward passes, one routed as the case says."""
    case.setting("draw_order", "")
    share = case.choice("shared", {"down": "down", "up": "up", "none": "none", None: "none"})
    style = case.choice("style", {"adaptformer": "adaptformer", "pfeiffer": "pfeiffer"}, default="adaptformer")
    split = case.choice("split", {"entry": "entry", "row": "row", "column": "column"}, default="entry")
    activation = case.choice("activation", {"gelu": "gelu", "relu": "relu", "silu": "silu", None: None}, default=None)
    backbone = _block(case)
    method = MoSA(
        hidden_dim=case.setting("hidden"), experts=case.setting("experts"), share=share, style=style, split=split,
        activation=activation, scale=case.setting("scale", None), dropout=0.0,
    )  # fmt: skip
    case.require("dropout", 0.0)
    adapter = method.attach(backbone)
    (bottleneck,) = (module for module in adapter.modules() if isinstance(module, MixtureBottleneck))
    case.require("adapter_norm_eps", bottleneck.norm.eps)
    sides = {"down": bottleneck.down, "up": bottleneck.up}
    for name, side in sides.items():
        active = case.setting(f"active_{name}")
        side.fixed = active if side.experts > 1 else 0
        _fill(case, name, side, split)
    bottleneck.norm.load_state_dict(case.state(bottleneck.norm.state_dict(), lambda n: f"param.adapter.norm.{n}"))

    x = case.take("in.x").requires_grad_()
    adapter.train()
    y = backbone({"tokens": x}).tokens
    case.compare("out.y_train", y)
    y.backward(case.take("in.cotangent"))
    adapter.events.after_backward(0)
    case.compare_gradient("x", x.grad)
    for name, parameter in bottleneck.named_parameters():
        if parameter.grad is not None:
            case.compare_gradient(_theirs(name, sides), parameter.grad)
    adapter.eval()
    case.compare("out.y_merged", backbone({"tokens": x}).tokens)
    for name, side in sides.items():
        for key, value in side.packed().items():
            case.compare(f"out.merged.{name}.{key}", value)
    divergence = symmetric_divergence(case.take("in.logits_a"), case.take("in.logits_b"))
    case.compare("out.symmetric_kl", divergence)


def _fill(case: GoldenCase, name: str, side: ExpertLinear, split: Split) -> None:
    for expert in range(side.experts):
        where = f"param.adapter.{name}" + (f".{expert}" if side.experts > 1 else "")
        with torch.no_grad():
            side.get_parameter(f"weight_{expert}").copy_(case.take(f"{where}.weight"))
            side.get_parameter(f"bias_{expert}").copy_(case.take(f"{where}.bias"))
    if side.experts > 1:
        # Of rows and columns one score each would do.
        scores = case.take(f"in.score.{name}")
        along = {"entry": scores.shape, "row": (side.owner.shape[0], -1), "column": (-1, side.owner.shape[1])}[split]
        side.owner = owners(scores.reshape(along).expand(side.owner.shape), side.experts, split)
        case.compare(f"out.mask.{name}", side.masks())


def _theirs(name: str, sides: dict[str, ExpertLinear]) -> str:
    found = re.fullmatch(r"(down|up)\.(weight|bias)_(\d+)", name)
    if found is None:
        return f"adapter.{name}"
    side, tensor, expert = found.groups()
    return f"adapter.{side}.{expert}.{tensor}" if sides[side].experts > 1 else f"adapter.{side}.{tensor}"


def _block(case: GoldenCase) -> BareBlocks:
    dim = case.setting("dim")
    backbone = BareBlocks(
        width=dim, num_heads=case.setting("num_heads"), mlp_ratio=case.setting("mlp_dim") / dim, qkv_bias=True,
        norm_eps=case.setting("norm_eps", 1e-6),
    )  # fmt: skip
    state = {}
    for name in backbone.network.state_dict():
        ours, _, tensor = name.removeprefix("blocks.0.").rpartition(".")
        if ours == "attn.qkv":
            state[name] = torch.cat([case.take(f"base.attn.{part}.{tensor}") for part in ("query", "key", "value")])
        else:
            state[name] = case.take(f"base.{_NAMES[ours]}.{tensor}")
    backbone.network.load_state_dict(state)
    return backbone
