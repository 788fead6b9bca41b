"""Taps: what is read, what is not in it, and whether it carries a gradient."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close, gradients, projection_loss
from plain_backbone import attach
from tiny_backbones import TinyViT
from torch import Tensor

from peft_modal.anatomy import Port
from peft_modal.errors import AttachError
from peft_modal.methods.vpt import VPT


def port(backbone: TinyViT, role: str, block: int | None = 1) -> Port:
    return backbone.anatomy.port(role, stack="blocks", block=block)


def seen_by_a_hook(backbone: TinyViT, block: int) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    module = backbone.network.blocks[block]
    handles = [
        module.register_forward_pre_hook(lambda _m, args: seen.__setitem__("in", args[0])),
        module.register_forward_hook(lambda _m, _args, output: seen.__setitem__("out", output)),
    ]
    backbone(backbone.example_batch())
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("role", "side"), [("block.in", "in"), ("block.out", "out")])
def test_a_tap_reads_what_the_module_sees(role: str, side: str) -> None:
    backbone = TinyViT()
    expected = seen_by_a_hook(backbone, 1)[side]
    attach(backbone, lambda a: a.tap(port(backbone, role), "middle"))
    features = backbone(backbone.example_batch())
    assert torch.equal(features.extras["middle"], expected)
    assert backbone.contexts.current().taps["middle"] is features.extras["middle"]


def test_a_tap_changes_nothing_and_leaves_no_graph_behind_frozen_weights() -> None:
    backbone = TinyViT()
    before = backbone(backbone.example_batch()).tokens
    attach(backbone, lambda a: a.tap(port(backbone, "block.out"), "middle"))
    features = backbone(backbone.example_batch())
    assert torch.equal(features.tokens, before)
    assert features.extras["middle"].grad_fn is None


@pytest.mark.parametrize("order", ["tap first", "prompts first"])
def test_a_tap_never_sees_a_prompt(order: str) -> None:
    backbone = TinyViT()

    def tap() -> None:
        attach(
            backbone,
            lambda a: [a.tap(port(backbone, "block.in"), "in"), a.tap(port(backbone, "block.out"), "out")],
            name="tap",
        )

    if order == "tap first":
        tap()
    VPT(num_tokens=3).attach(backbone, name="vpt")
    if order == "prompts first":
        tap()
    extras = backbone(backbone.example_batch()).extras
    assert extras["in"].shape == extras["out"].shape == (2, 17, 32)


def test_a_propagating_tap_carries_the_gradient_of_what_lies_before() -> None:
    backbone = TinyViT()

    def build(a: object) -> None:
        a.own_tensor("blocks.0.norm1.bias")
        a.tap(port(backbone, "block.out"), "middle")

    adapter = attach(backbone, build)
    middle = backbone(backbone.example_batch()).extras["middle"]
    (gradient,) = gradients(projection_loss(middle), adapter.parameters())
    assert gradient.abs().max() > 0


def test_a_method_that_does_not_propagate_gets_cut_tensors() -> None:
    backbone = TinyViT()
    attach(backbone, lambda a: a.own_tensor("blocks.0.norm1.bias"), name="trained")
    attach(backbone, lambda a: a.tap(port(backbone, "block.out"), "middle"), name="side", propagates=False)
    features = backbone(backbone.example_batch())
    assert not features.extras["middle"].requires_grad
    assert features.tokens.requires_grad


def test_checkpointing_changes_no_gradient_through_a_tap() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = TinyViT()

        def build(a: object, backbone: TinyViT = backbone) -> None:
            a.own_tensor("blocks.0.norm1.bias")
            for i in range(3):
                a.tap(port(backbone, "block.out", i), f"block{i}")

        adapter = attach(backbone, build)
        backbone.blocks_for_checkpointing(enabled=checkpointing)
        features = backbone(backbone.example_batch())
        loss = sum(projection_loss(features.extras[f"block{i}"], seed=i) for i in range(3))
        results.append(gradients(loss + projection_loss(features.tokens), adapter.parameters()))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, tolerance=1e-6)


def test_a_taken_key_is_refused() -> None:
    backbone = TinyViT()
    attach(backbone, lambda a: a.tap(port(backbone, "block.out"), "middle"), name="first")
    with pytest.raises(AttachError, match="another tap already reads into 'middle'"):
        attach(backbone, lambda a: a.tap(port(backbone, "block.in"), "middle"), name="second")


def test_a_port_that_cannot_be_read_is_refused() -> None:
    backbone = TinyViT()
    closed = Port(
        name="closed", role="x", stack="blocks", block=1, module="norm", side="out", width=32, allows=frozenset({"add"})
    )
    with pytest.raises(AttachError, match="port 'closed' cannot be read"):
        attach(backbone, lambda a: a.tap(closed, "x"))
