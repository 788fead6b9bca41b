"""Masked pre-training of the point transformer: one training step with a given mask."""

from __future__ import annotations

from golden_runners.golden_case import GoldenCase
from golden_runners.point_network import compare_gradients, point_backbone
from golden_runners.reading import output_of
from peft_modal.methods.full import Full
from peft_modal_pointcloud.masked import (
    MaskedDecoder,
    block_mask,
    chamfer_l1,
    chamfer_l2,
    masked_patches,
    random_mask,
)

ENCODER = "MAE_encoder."
MASKS = {"rand": random_mask, "random": random_mask, "block": block_mask}


def step(case: GoldenCase) -> None:
    """Encode the visible patches, rebuild the hidden ones, and the gradients of the loss."""
    # BatchNorm uses batch statistics, which the frozen mode `eval` would not allow.
    backbone = point_backbone(case, prefix=ENCODER, frozen_mode="reference")
    adapter = Full().attach(backbone)
    dim = case.setting("trans_dim")
    decoder = MaskedDecoder(
        dim=dim,
        depth=case.setting("decoder_depth"),
        num_heads=case.setting("decoder_num_heads"),
        group_size=case.setting("group_size"),
        mlp_ratio=case.shape("param.MAE_decoder.blocks.0.mlp.fc1.weight")[0] / dim,
        drop_path=case.setting("drop_path_rate", 0.0),
    )
    case.fill(decoder, lambda name: f"param.{name}")
    training = case.choice("mode", {"train": True, "eval": False}, default="train")
    backbone.train(training)
    adapter.train(training)
    decoder.train(training)
    arguments: list[tuple] = []
    decoder.MAE_decoder.register_forward_pre_hook(lambda _module, args: arguments.append(args))
    decoded = output_of(decoder.MAE_decoder)

    mask = case.take("in.mask").bool()
    points = case.take("in.points").requires_grad_("grad.points" in case)
    features = backbone({"points": points, "mask": mask})
    centres = features.extras["centres"]
    rebuilt = decoder(features.tokens, centres, mask)
    target = masked_patches(features.extras["neighbourhood"], mask)
    loss = case.choice("loss", {"cdl2": chamfer_l2, "cdl1": chamfer_l1})(rebuilt, target)
    loss.backward()

    case.require("masked_groups", int(mask[0].sum()))
    ratio = case.setting("mask_ratio")
    kinds = {case.choice("mask_type", MASKS, default="rand"), case.choice("mask", MASKS, default="rand")}
    for kind in kinds:
        drawn = kind(*mask.shape, ratio) if kind is random_mask else kind(centres, ratio)
        assert (drawn.sum(1) == mask.sum(1)).all(), f"{case.name}: a ratio of {ratio} hides another number of patches"
    decoder_input, positions, _ = arguments[0]
    case.compare("out.x_vis", features.tokens)
    case.compare("out.decoder_input", decoder_input)
    case.compare("out.decoder_pos", positions)
    case.compare("out.decoder_output", decoded[0])
    case.compare("out.rebuilt", rebuilt)
    case.compare("out.target", target)
    case.compare("out.loss", loss)
    case.compare("out.center", centres)
    case.compare("out.neighborhood", features.extras["neighbourhood"])
    case.compare_gradient("points", points.grad)
    trained = {ENCODER + name.removeprefix("backbone."): p for name, p in adapter.named_trained().items()}
    compare_gradients(case, {**trained, **dict(decoder.named_parameters())})
    state = {ENCODER + name.removeprefix("backbone."): value for name, value in adapter.state().items()}
    for name in case.names("out.after_train."):
        case.compare(f"out.after_train.{name}", state.get(name))
