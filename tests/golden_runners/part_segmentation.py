"""Part segmentation: propagation, taps and figures, and the whole networks, plain and with IDPT's prompts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from golden_runners.golden_case import GoldenCase
from golden_runners.point_network import point_backbone
from golden_runners.prompt_generator import VARIANTS
from golden_runners.reading import output_of
from peft_modal_heads.parts import PartOutput, PartTable
from peft_modal_heads.pointcloud_parts import PointCloudParts
from peft_modal_heads.propagation import FeaturePropagation
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.idpt_parts import IDPTParts
from peft_modal_pointcloud.part_metrics import GroupMean, shape_ious


def pieces(case: GoldenCase) -> None:
    """The propagation with frozen and batch statistics, taps with gradients, and the figures."""
    _propagation(case)
    _taps(case)
    _figures(case)


def plain(case: GoldenCase) -> None:
    """The whole network with the head's own shape features."""
    _network(case, prompted=False)


def prompted(case: GoldenCase) -> None:
    """The whole network with a prompt for each tap."""
    _network(case, prompted=True)


def _network(case: GoldenCase, *, prompted: bool) -> None:
    case.choice("variant", {"idpt": True} if prompted else {"plain": True}, default="idpt" if prompted else "plain")
    backbone = point_backbone(case, has_cls=False, levels=case.setting("taps_zero_based"))
    if prompted:
        module = case.choice("generator", VARIANTS, default="mlp")
        adapter = IDPTParts(prompt_module=module).attach(backbone)
        adapter.load(case.state(adapter.state(), lambda name: f"param.{name.removeprefix('adapter.idpt.')}"))
        adapter.eval()
    one_hot = case.take("in.label_one_hot")
    category = one_hot.argmax(1)
    assert torch.equal(torch.nn.functional.one_hot(category, one_hot.shape[1]).to(one_hot), one_hot)
    num_parts = case.setting("num_parts")
    # How parts belong to categories plays no part in the network, only how many categories there are.
    names = tuple(f"{part % one_hot.shape[1]}/{part}" for part in range(num_parts))
    head = PointCloudParts(
        backbone.feature_spec(), num_parts, names,
        propagation_dims=tuple(case.shape(f"param.propagation_0.mlp_convs.{i}.weight")[0] for i in range(2)),
        hidden_dims=tuple(case.shape(f"param.convs{i}.weight")[0] for i in (1, 2)),
        category_dim=case.shape("param.label_conv.0.weight")[0],
    )  # fmt: skip
    case.fill(head, lambda name: f"param.{name}")
    with torch.no_grad():
        output = head.eval()(backbone({"points": case.take("in.points"), "category": category}))
    case.compare("out.log_probs", output.log_probs)


def _propagation(case: GoldenCase) -> None:
    case.require("num_points", case.shape("fp.in.xyz")[2])
    case.require("num_centers", case.shape("fp.in.centers")[2])
    places, centres = (case.take(f"fp.in.{name}").transpose(1, 2) for name in ("xyz", "centers"))
    for mode in ("eval", "train"):
        module = FeaturePropagation(case.shape("fp.in.features")[1], case.setting("fp_mlp"))
        case.fill(module, lambda name: f"fp.param.{name}")
        features = case.take("fp.in.features").requires_grad_()
        out = module.train(mode == "train")(places, centres, features.transpose(1, 2)).transpose(1, 2)
        case.compare(f"fp.out.{mode}", out)
        out.backward(case.take("fp.in.probe"))
        # One set of gradients is stored, without saying which mode made it; a name may say so.
        prefix = f"fp.grad_{mode}" if any(name.startswith(f"fp.grad_{mode}.") for name in case.tensors) else "fp.grad"
        if prefix == "fp.grad" and mode == "train":
            continue
        case.compare_gradient("features", features.grad, prefix=prefix)
        for name, parameter in module.named_parameters():
            case.compare_gradient(name, parameter.grad, prefix=prefix)


def _taps(case: GoldenCase) -> None:
    taps = case.setting("taps_zero_based")
    batch, num_group, dim = case.shape("taps.in.tokens")
    case.require("batch", batch)
    case.require("num_centers", num_group)
    case.require("dim", dim)
    for prompts in (False, True):
        backbone = PointMAEBackbone(
            weights="random", dim=dim, depth=case.setting("depth"), num_heads=case.setting("num_heads"),
            num_group=num_group, group_size=1, drop_path=case.setting("drop_path_rate", 0.0), has_cls=False,
            mlp_ratio=case.shape("taps.param.blocks.0.mlp.fc1.weight")[0] / dim, levels=taps,
        )  # fmt: skip
        network = backbone.network
        case.fill(network.blocks.blocks, lambda name: f"taps.param.blocks.{name}")
        tokens, positions = case.take("taps.in.tokens").requires_grad_(), case.take("taps.in.pos")
        # The case starts behind the embeddings.
        network.encoder.register_forward_hook(lambda *_, tokens=tokens: tokens)
        network.pos_embed.register_forward_hook(lambda *_, positions=positions: positions)
        leaving = {block: output_of(network.blocks.blocks[block]) for block in taps}
        if not prompts:
            backbone(backbone.example_batch(batch))
            for block in taps:
                case.compare(f"taps.out.plain.{block}", leaving[block][0])
            continue
        adapter = IDPTParts(prompt_module=case.choice("generator", VARIANTS)).attach(backbone)

        def rename(name: str) -> str:
            name = name.removeprefix("adapter.idpt.")
            return "taps.in.prompt_pos" if name == "prompt_pos" else f"taps.param.{name}"

        state = case.state(adapter.state(), rename)
        position = adapter.adapter.get_submodule("idpt").prompt_pos
        adapter.load({n: v.view_as(position) if n.endswith("prompt_pos") else v for n, v in state.items()})
        adapter.eval()
        source = adapter.adapter.get_submodule("idpt")
        entering = {block: output_of(source.generator[str(block)]) for block in taps}
        backbone(backbone.example_batch(batch))
        found = {block: torch.cat([entering[block][0], leaving[block][0]], dim=1) for block in taps}
        for block, tap in found.items():
            case.compare(f"taps.out.idpt.{block}", tap)
        probes = [case.take(f"taps.in.probe.{block}") for block in taps]
        torch.autograd.backward(list(found.values()), probes)
        case.compare_gradient("tokens", tokens.grad, prefix="taps.grad")
        for name, parameter in source.named_parameters():
            gradient: Tensor | None = parameter.grad
            if name == "prompt_pos" and gradient is not None:
                gradient = gradient.view(case.shape("taps.in.prompt_pos"))
            case.compare_gradient(name, gradient, prefix="taps.grad")


def _figures(case: GoldenCase) -> None:
    """The metrics stand in case.json, not among the tensors."""
    classes, expected = case.json["seg_classes"], case.json["metrics"]
    owner = {part: name for name, parts in classes.items() for part in parts}
    table = PartTable([f"{owner[part]}/{part}" for part in range(case.shape("iou.in.logits")[2])])
    parts = case.take("iou.in.target").long()
    category = table.category_of[parts[:, 0]]
    found = table.found(PartOutput(case.take("iou.in.logits"), category))
    ious, right = shape_ious(found, parts, category, table), (found == parts).flatten()
    by_category, by_part = GroupMean(table.num_categories), GroupMean(len(table.class_names))
    instance, accuracy = GroupMean(), GroupMean()
    instance.update(ious)
    accuracy.update(right)
    by_category.update(ious, category)
    by_part.update(right, parts.flatten())
    ours = {
        "accuracy": accuracy.compute(), "class_avg_accuracy": by_part.compute(),
        "class_avg_iou": by_category.compute(), "instance_avg_iou": instance.compute(),
    }  # fmt: skip
    per_category = dict(zip(table.categories, by_category.means(), strict=True))
    theirs = {name: value for name, value in expected.items() if name != "per_category"}
    for own, other in ((ours, theirs), (per_category, expected["per_category"])):
        assert own.keys() == other.keys(), f"{case.name}: figures {sorted(own)}, expected {sorted(other)}"
        for name, value in own.items():
            if not math.isclose(float(value), other[name], abs_tol=1e-6):
                case.report(f"{name}: {float(value):.7f}, expected {other[name]:.7f}")
