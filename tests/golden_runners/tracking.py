"""LoRAT: input embedding, head, losses, the whole network with LoRA, crops; and every toolkit's metrics."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from golden_runners.golden_case import GoldenCase
from peft_modal.anatomy import Features
from peft_modal.attach.merge import merge_
from peft_modal.methods.lora import LoRA
from peft_modal_heads.tracking_mlp import TrackingMLP, TrackingOutput, cell_centres
from peft_modal_tracking import losses as module_losses
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.boxes import cells_of
from peft_modal_tracking.losses import positive_cells, tracking_losses
from peft_modal_tracking.metrics import Result, frame_ious, got10k, lasot_official, one_pass, trackingnet
from peft_modal_tracking.network import OneStreamViT
from peft_modal_tracking.selection import hann_window, select_box
from peft_modal_tracking.steps import CropSettings, TrackState
from peft_modal_vision.backbone import ViT

INTERPOLATION = "bilinear, align_corners False, no antialias"


def input_embed(case: GoldenCase) -> None:
    """Patches, sliced positions and token types, before the first block."""
    patch, grid = case.setting("patch"), case.setting("backbone_grid")
    sizes = {
        "img_size": [side * patch for side in grid], "patch_size": patch, "embed_dim": case.setting("dim"), "depth": 1,
        "num_heads": 1,
    }  # fmt: skip
    vit: Any = ViT(model="custom", weights="random", sizes=sizes).network
    with torch.no_grad():
        vit.pos_embed.copy_(case.take("in.backbone_pos_embed"))
    network = OneStreamViT(
        vit, template_grid=tuple(case.setting("template_grid")), search_grid=tuple(case.setting("search_grid"))
    )
    with torch.no_grad():
        for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "token_type_embed"):
            network.get_parameter(name).copy_(case.take(f"param.{name}"))
    template, search = (case.take(f"in.{name}").requires_grad_() for name in ("template", "search"))
    tokens = network.embed(template, search, case.take("in.template_mask"))
    case.compare("out.pos_embed", network.pos_embed)
    case.compare("out.tokens", tokens)
    (tokens * case.take("in.loss_weight")).sum().backward()
    for name, tensor in (("template", template), ("search", search), ("token_type_embed", network.token_type_embed)):
        case.compare_gradient(name, tensor.grad)


def head(case: GoldenCase) -> None:
    """Scores, boxes, the window, and the cell that is chosen with and without it."""
    columns, rows = case.setting("map_wh")
    width, height = case.setting("search_wh")
    tokens = case.take("in.tokens").requires_grad_()
    spec = LoRAT.tiny().feature_spec()
    made = TrackingMLP(type(spec)(width=case.setting("dim"), layout=None, levels=(case.setting("dim"),)))
    case.fill(made, lambda name: f"param.{name}")
    level = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    output = made(Features(tokens, None, {"level.0": level}))
    case.compare("out.score_map", output.scores)
    case.compare("out.boxes", output.boxes)
    case.compare("out.reference_points", cell_centres(output.scores))
    case.compare("out.hann_window", hann_window((rows, columns)))
    penalty = case.setting("window_penalty")
    for name, window in ((f"window_{penalty}", hann_window((rows, columns))), ("no_window", None)):
        box, confidence = select_box(output, (height, width), window, penalty)
        case.compare(f"out.box_{name}", box)
        case.compare(f"out.confidence_{name}", confidence)
    _backward(case, output)
    case.compare_gradient("tokens", tokens.grad)
    for name, parameter in made.named_parameters():
        case.compare_gradient(name, parameter.grad)


def loss(case: GoldenCase) -> None:
    """Positive cells, both losses, and their gradients."""
    columns, rows = case.setting("map_wh")
    width, height = case.setting("search_wh")
    for name, value in (("cls_weight", 1.0), ("box_weight", 1.0)):
        case.require(name, value)
    case.require("iou_eps", module_losses.IOU_EPSILON)
    case.require("giou_eps", module_losses.GIOU_EPSILON)
    scores, boxes = (case.take(f"in.{name}").requires_grad_() for name in ("score_map", "boxes"))
    targets = case.take("in.target_box_pixels")
    cells = positive_cells(targets, (height, width), (rows, columns))
    case.compare("out.positive_cells", cells)
    case.compare("out.num_positive", cells.sum().float())
    found = tracking_losses(TrackingOutput(scores, boxes), targets, (height, width))
    case.compare("out.loss_cls", found["loss_cls"])
    case.compare("out.loss_box", found["loss_box"])
    total = found["loss_cls"] + found["loss_box"]
    case.compare("out.loss", total)
    total.backward()
    case.compare_gradient("score_map", scores.grad)
    case.compare_gradient("boxes", boxes.grad)


def network(case: GoldenCase) -> None:
    """The tracker with LoRA on every linear: outputs, gradients, and the merged query-key-value weight."""
    case.choice("act", {"gelu (erf)": "gelu"})
    case.choice("layer_scale", {"ls1.gamma, ls2.gamma": "gamma"})
    case.require("norm_eps", 1e-6)
    patch, dim = case.setting("patch"), case.setting("dim")
    template, search = case.setting("template_grid"), case.setting("search_grid")
    sizes = {
        "img_size": search * patch, "patch_size": patch, "embed_dim": dim, "depth": case.setting("depth"),
        "num_heads": case.setting("heads"), "mlp_ratio": case.setting("mlp_hidden") / dim, "init_values": 1.0,
    }  # fmt: skip
    backbone = LoRAT(
        model="custom", weights="random", template_size=template * patch, search_size=search * patch, sizes=sizes
    )
    case.fill(backbone.network, lambda name: f"param.{name}")
    rank, alpha = case.setting("rank"), case.setting("alpha")
    method = LoRA(sites=["attn", "mlp"], rank=rank, alpha=alpha, init="trunc_normal")
    case.require("scaling", method.scale)
    adapter = method.attach(backbone)

    def rename(name: str) -> str:
        name = name.removeprefix("backbone.")
        return re.sub(r"^adapter\.blocks\.(\d+)\.", r"lora.\1.", name)

    adapter.load(case.state(adapter.state(), lambda name: f"param.{rename(name)}"))
    made = TrackingMLP(backbone.feature_spec())
    case.fill(made, lambda name: f"param.head.{name}")
    batch = {name: case.take(f"in.{name}") for name in ("template", "search", "template_mask")}
    output = made(backbone(batch))
    case.compare("out.score_map", output.scores)
    case.compare("out.boxes", output.boxes)
    _backward(case, output)
    for name, parameter in adapter.named_trained().items():
        case.compare_gradient(rename(name), parameter.grad)
    for name, parameter in made.named_parameters():
        case.compare_gradient(f"head.{name}", parameter.grad)
    merge_(backbone)
    state = backbone.network.state_dict()
    for number in case.names("out.merged_qkv_"):
        case.compare(f"out.merged_qkv_{number}", state[f"blocks.{number}.attn.qkv.weight"])


def crops(case: GoldenCase) -> None:
    """Template, mask and search pictures over several steps, and boxes mapped back by what was really cut out."""
    assert case.setting("interpolation") == INTERPOLATION
    sizes = {name: tuple(reversed(case.setting(f"{name}_wh"))) for name in ("template", "search")}
    settings = CropSettings(
        sizes["template"], sizes["search"], case.setting("template_area_factor"), case.setting("search_area_factor"),
        normalize="imagenet", min_object=case.setting("min_object_size"),
    )  # fmt: skip
    image = case.take("in.image")
    size = (image.shape[1], image.shape[2])
    grid = tuple(reversed(case.setting("template_grid_wh")))
    state = TrackState(image, case.take("in.init_box"), settings)
    case.compare("out.template_params", _parameters(state.template_wanted))
    case.compare("out.template_params_adjusted", _parameters(state.template_map))
    case.compare("out.template", state.template)
    case.compare("out.template_mask", cells_of(state.template_box[None], settings.template_size, grid)[0])
    case.compare("out.image_mean", state.fill)
    wanted, adjusted, boxes = [], [], []
    for step, found in enumerate(case.take("in.predicted_boxes_in_crop")):
        search = state.look(image)
        if step == 0:
            case.compare("out.search_first", search)
        wanted.append(_parameters(state.wanted))
        adjusted.append(_parameters(state.map))
        boxes.append(state.update(found, size))
    case.compare("out.search_params", torch.stack(wanted))
    case.compare("out.search_params_adjusted", torch.stack(adjusted))
    case.compare("out.boxes_in_image", torch.stack(boxes))


def metrics(case: GoldenCase) -> None:
    """One-pass evaluation with both rules, LaSOT's own toolkit, GOT-10k's and TrackingNet's."""
    width, height = case.setting("got10k_bound_wh")
    results = [
        Result(
            case.take(f"in.predicted_{i}"), case.take(f"in.target_{i}"), case.take(f"in.visible_{i}").bool(),
            (height, width),
        )
        for i in case.names("in.target_")
    ]  # fmt: skip
    for i, result in enumerate(results):
        case.compare(f"out.iou_{i}", frame_ious(result.predicted, result.target))
        for rules in ("plain", "lasot"):
            scores = one_pass(result, rules)
            _nearly(case, f"out.{rules}_success_curve_{i}", scores.success, len(result.target))
            case.compare(f"out.{rules}_precision_curve_{i}", scores.precision)
            case.compare(f"out.{rules}_norm_precision_curve_{i}", scores.normalised)
            _figures(case, f"out.{rules}_scores_{i}", list(scores.figures.values()), len(result.target))
        official = list(lasot_official(result).figures.values())[:3]
        _figures(case, f"out.lasot_official_scores_{i}", official, len(result.target))
    figures, curve = got10k(results)
    case.compare("out.got10k", torch.tensor(list(figures.values())))
    case.compare("out.got10k_success_curve", curve)
    _loosely(case, "out.trackingnet", torch.tensor(list(trackingnet(results).values())), 1e-4)


def _backward(case: GoldenCase, output: TrackingOutput) -> None:
    weights = [case.take(f"in.loss_weight_{name}") for name in ("score", "boxes")]
    sum((part * weight).sum() for part, weight in zip(output, weights, strict=True)).backward()


def _parameters(found: Any) -> Tensor:
    return torch.stack([found.scale, found.shift])


def _nearly(case: GoldenCase, name: str, curve: Tensor, frames: int) -> None:
    """At threshold 1 an IoU of 1 up to rounding decides one frame; the case's note allows it."""
    slack = torch.zeros(len(curve))
    slack[-1] = 1 / frames
    case.compare_loosely(name, curve, slack)


def _figures(case: GoldenCase, name: str, figures: list[float], frames: int) -> None:
    """Likewise of the mean over the curve, which comes first."""
    slack = torch.zeros(len(figures))
    slack[0] = 1 / (21 * frames)
    case.compare_loosely(name, torch.tensor(figures), slack)


def _loosely(case: GoldenCase, name: str, found: Tensor, slack: float) -> None:
    case.compare_loosely(name, found, torch.full_like(found, slack))
