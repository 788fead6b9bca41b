"""Masks over CLIP's vision tower: both losses, both gradients, gradient dropout and one step."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
from torch import Tensor

from golden_runners.golden_case import GoldenCase
from peft_modal.attach import Run
from peft_modal.methods.r_amt import EPSILON, RAMT, Mask, RegularisedMasks, training
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_clip.classification import ClassNames
from peft_modal_heads.identity import Identity

ROLES = {
    "conv1": "embed", "attn.in_proj": "attn.qkv", "attn.out_proj": "attn.out", "mlp.c_fc": "mlp.in",
    "mlp.c_proj": "mlp.out",
}  # fmt: skip


def step(case: GoldenCase) -> None:
    """One training step for each strength of the gradient dropout."""
    backbone = _backbone(case)
    case.require("eps_graddrop", EPSILON)
    strengths = case.setting("lambdas")
    for figure in ("sparsity_percent", "fraction_of_gradient_entries_equal_to_task_gradient"):
        case.setting(figure, None)  # what the authors' code printed of masks and gradients that are compared below
    for strength in strengths:
        _step(case, backbone, strength, is_first=strength == strengths[0])


def _step(case: GoldenCase, backbone: OpenCLIPBackbone, strength: float, *, is_first: bool) -> None:
    roles = [ROLES[name] for name in case.setting("masked")]
    method = RAMT(
        sites={"roles": roles, "stacks": ["visual"]}, threshold=case.setting("threshold"),
        init=case.setting("mask_init"), gate_strength=strength or 1.0, norm_weight=case.setting("mask_loss_weight"),
        temperature=case.setting("temperature", 1.0),
    )  # fmt: skip
    adapter = method.attach(backbone)
    names = tuple(str(label) for label in range(case.setting("classes")))
    task = ClassNames(backbone, adapter, Identity(spec=backbone.feature_spec(), num_outputs=len(names)), names)
    text = case.take("in.text")
    task.class_embeddings = lambda: text  # type: ignore[method-assign]
    run = next(member for member in adapter.modules() if isinstance(member, RegularisedMasks))
    optimizer = _adam(case, adapter.named_trained().values())
    run.on_fit_start(Run(1, [optimizer], torch.Generator(), {}, forward=task, gives_logits=True))

    masks = {_name(site): mask for site, mask in run.masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            mask.mask_logit.copy_(case.take(f"param.{name}.mask_logit"))
    batch = {"image": case.take("in.image"), "label": case.take("in.label")}
    logits = task(batch)
    losses = {**task.losses(batch, logits), **run.penalty(batch, logits)}
    if is_first:
        _compare_losses(case, losses, logits, run.teacher(batch), method, masks)
    noise = iter([case.take(f"in.noise.{name}") for name in masks])
    with patch.object(training, "_shared", lambda _: next(noise)):
        run.method.gate_strength = strength
        run.compute_gradients(losses, dict, lambda loss: loss.backward())  # type: ignore[arg-type, no-untyped-call]
    for name, mask in masks.items():
        case.compare(f"out.lam{strength:g}.grad.{name}.mask_logit", mask.mask_logit.grad)
    optimizer.step()
    for name, mask in masks.items():
        case.compare(f"out.lam{strength:g}.after1.{name}.mask_logit", mask.mask_logit.detach())
    adapter.detach()


def _compare_losses(
    case: GoldenCase, losses: dict[str, Tensor], logits: Tensor, teacher: Tensor, method: RAMT, masks: dict[str, Mask]
) -> None:
    case.compare("out.logits", logits)
    case.compare("out.teacher_logits", teacher)
    case.compare("out.ce", losses["loss"].view(1))
    case.compare("out.general", losses["general"].view(1))
    case.compare("out.mask_norm", (losses["mask_norm"] / method.norm_weight).view(1))
    for kind, parts in {"general": ["general"], "task": ["loss", "mask_norm"]}.items():
        loss = torch.stack([losses[part] for part in parts]).sum()
        found = torch.autograd.grad(loss, [mask.mask_logit for mask in masks.values()], retain_graph=True)
        for name, gradient in zip(masks, found, strict=True):
            case.compare_gradient(f"{name}.mask_logit", gradient, prefix=f"grad.{kind}")
    for name, mask in masks.items():
        case.compare(f"out.packed.{name}", mask.packed()["mask_bits"])


def _adam(case: GoldenCase, parameters: object) -> torch.optim.Adam:
    options = case.setting("adam")
    return torch.optim.Adam(
        parameters, lr=case.setting("lr"), betas=tuple(options["betas"]), eps=options["eps"],  # type: ignore[arg-type]
        weight_decay=options["weight_decay"],
    )  # fmt: skip


def _name(site: str) -> str:
    """`visual.blocks.0.attn.qkv` as the card calls it."""
    if site == "visual.conv1":
        return "conv1"
    _, _, block, role = site.split(".", maxsplit=3)
    return f"blocks.{block}.{next(name for name, ours in ROLES.items() if ours == role)}"


def _backbone(case: GoldenCase) -> OpenCLIPBackbone:
    width, heads = case.setting("width"), case.setting("heads")
    hidden = case.shape("base.transformer.resblocks.0.mlp.c_fc.weight")[0]
    backbone = OpenCLIPBackbone(
        weights="random", embed_dim=case.setting("embed_dim"), image_size=case.setting("resolution"),
        patch_size=case.setting("patch"), vision_width=width, vision_layers=case.setting("layers"), vision_heads=heads,
        vision_mlp_ratio=hidden / width, context_length=4, vocab_size=8, text_width=8, text_layers=1, text_heads=1,
        quick_gelu=True, tokenizer="clip",
    )  # fmt: skip
    case.fill(backbone.network.visual, lambda name: f"base.{name}")  # type: ignore[arg-type]
    with torch.no_grad():
        backbone.network.logit_scale.fill_(math.log(case.setting("logit_scale")))  # type: ignore[operator]
    return backbone
