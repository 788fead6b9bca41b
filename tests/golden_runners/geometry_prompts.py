"""Point-PEFT: prior tokens, both groupings, and one block with and without prompts."""

from __future__ import annotations

from torch import Tensor

from golden_runners.golden_case import GoldenCase
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.point_peft import PointPEFT
from peft_modal_pointcloud.point_peft.grouping import ReferenceGrouping, flat_rows, neighbourhoods
from peft_modal_pointcloud.point_peft.prior import PriorPrompts, prior_tokens
from peft_modal_pointcloud.sampling import farthest_point_sample, gather_points

BLOCK = "blocks.blocks.0."
OURS = {
    "adapter.blocks.0.ffn_adapter.": "ffn_adapter.",
    "adapter.blocks.0.geometry.bn.": "geo_bn.",
    "adapter.blocks.0.geometry.bottleneck.": "geo_adapter.",
    "adapter.geometry.attention.norm.": "geo_norm.",
    "adapter.geometry.attention.": "geo_attn.",
    "adapter.geometry.prompted.": "",
    "adapter.prompts.blocks.0.embeddings": "prompt.embeddings",
    "adapter.prompts.blocks.0.prior_adapter.": "prior_adapter.",
    f"backbone.{BLOCK}": "",
}
"""Our names' beginnings and the case's."""
OUTSIDE = ("adapter.prompts.bank", "backbone.norm.")
"""What a single block does not read: the case gives its prior tokens and ends before the final norm."""


def prior_and_geometry(case: GoldenCase) -> None:
    """What every block reads, then the block in its two forms."""
    batch, _, dim = case.shape("in.x")
    case.require("batch", batch)
    case.require("dim", dim)
    case.require("bank_size", case.shape("in.bank")[1])
    case.require("prompt_tokens", case.setting("top_k") + 2)
    prior = prior_tokens(case.take("in.feature"), case.take("in.bank"), case.setting("top_k"))
    case.compare("out.prior_tokens", prior)
    points, num_tokens = case.take("in.points"), case.setting("tokens")
    centres = gather_points(points, farthest_point_sample(points, num_tokens))
    case.compare("out.center", centres)
    _grouping(case, centres, "")
    for form in ("early", "late"):
        _block(case, form, points=points, centres=centres, prior=prior)


def _grouping(case: GoldenCase, centres: Tensor, suffix: str) -> None:
    found = neighbourhoods(centres, num_sub_centres=case.setting("sub_centers"), k=case.setting("knn"))
    case.compare(f"out.sub_center{suffix}", gather_points(centres, found.centres))
    case.compare(f"out.center_index{suffix}", flat_rows(found.centres, centres.shape[1]).flatten())
    case.compare(f"out.knn_index{suffix}", flat_rows(found.members, centres.shape[1]).flatten())


def _block(case: GoldenCase, form: str, *, points: Tensor, centres: Tensor, prior: Tensor) -> None:
    mode = case.setting("mode", "eval").split(" ")[0]
    assert mode == "eval", f"{case.name}: mode '{mode}' is unknown; known: eval"
    backbone = _backbone(case)
    adapter = _method(case, form).attach(backbone)
    own = adapter.state()
    outside = {name: own.pop(name) for name in list(own) if name.startswith(OUTSIDE)}
    adapter.load({**outside, **case.state(own, lambda name: f"param.{_rename(name)}")})
    adapter.eval()
    context = backbone.contexts.begin({"points": points})
    context.put("centres", centres)
    prior = prior.clone().requires_grad_()
    if form == "early":
        prompts = adapter.adapter.get_submodule("prompts")
        assert isinstance(prompts, PriorPrompts)
        context.put(prompts.key, prior)
        grouping = adapter.adapter.get_submodule("geometry.prompted")
        assert isinstance(grouping, ReferenceGrouping)
        prompted = grouping.prompted_centres(context, centres.shape[1])
        case.compare("out.center_prompted", prompted)
        _grouping(case, prompted, "_prompted")
    x = case.take("in.x").requires_grad_()
    y = backbone.network.get_submodule(BLOCK.rstrip("."))(x)
    case.compare(f"out.{form}", y)
    y.backward(case.take("in.loss_weight"))
    trained = {
        _rename(name): parameter.grad
        for name, parameter in adapter.named_trained().items()
        if not name.startswith(OUTSIDE)
    }
    for name, gradient in {**trained, "x": x.grad, "prior_tokens": prior.grad}.items():
        case.compare_gradient(name, gradient, prefix=f"grad.{form}", sums=f"gradsum.{form}")


def _rename(name: str) -> str:
    ours = next(ours for ours in OURS if name.startswith(ours))
    return OURS[ours] + name.removeprefix(ours)


def _method(case: GoldenCase, form: str) -> PointPEFT:
    inner, heads = case.setting("geo_attention_dim"), case.setting("geo_attention_heads")
    case.require("heads", heads)
    return PointPEFT(
        prior_prompts=form == "early",
        prompt_blocks=1,
        top_k=case.setting("top_k"),
        num_sub_centres=case.setting("sub_centers"),
        k=case.setting("knn"),
        attention_dim=inner,
        indexing="reference",
        hidden_dim=case.setting("reduction"),
        prior_hidden_dim=case.setting("prior_reduction"),
    )


def _backbone(case: GoldenCase) -> PointMAEBackbone:
    """One block of the case; what makes and ends its sequence is not used."""
    backbone = PointMAEBackbone(
        weights="random",
        dim=case.setting("dim"),
        depth=1,
        num_heads=case.setting("heads"),
        mlp_ratio=case.setting("mlp_ratio"),
        num_group=case.setting("tokens"),
        group_size=case.setting("knn"),
        pointnet_dims=[4, 4, 4],
        train_cls=False,
    )
    block = backbone.network.get_submodule(BLOCK.rstrip("."))
    case.fill(block, lambda name: f"frozen.{name}" if f"frozen.{name}" in case else f"param.{name}")
    return backbone
