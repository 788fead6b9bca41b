"""Computed weights against functional_call with the computed tensor written out."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close, assert_same_state, draw, gradients, projection_loss, randomise, snapshot
from plain_backbone import PlainBackbone, attach
from tiny_backbones import TinyCLIP, TinyViT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.errors import AttachError


class Affine(nn.Module):
    """gain * W + shift, with W None counted as zero; starts as the identity."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, weight: Tensor | None) -> Tensor:
        if weight is None:
            return self.shift.expand(6)
        return self.gain.to(weight.dtype) * weight + self.shift.to(weight.dtype)


class Calls(nn.Module):
    """The identity that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return weight


def linear_backbone(*, bias: bool = True, parts: int = 0) -> PlainBackbone:
    net = nn.Sequential(nn.Linear(4, 6, bias=bias)).double()
    randomise(net, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        if parts:
            b.fused("op", "0", {f"op.{i}": f"part{i}" for i in range(parts)}, name="op")
        else:
            b.op("op", "0", name="op")

    return PlainBackbone(net, describe, example=(3, 4))


def test_the_forward_reads_the_computed_weight_and_gradients_reach_its_parameters() -> None:
    backbone = linear_backbone()
    f, layer = Affine(), backbone.network[0]
    adapter = attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("op"), f))
    randomise(adapter)
    x = draw(2, 3, 4).requires_grad_()
    leaves = [x, f.gain, f.shift]
    actual = backbone({"x": x}).tokens
    expected = functional.linear(x, f.gain * layer.weight + f.shift, layer.bias)
    assert_close(actual, expected)
    for got, wanted in zip(
        gradients(projection_loss(actual), leaves), gradients(projection_loss(expected), leaves), strict=True
    ):
        assert_close(got, wanted)


def test_a_slice_changes_its_own_rows_only() -> None:
    backbone = linear_backbone(parts=3)
    f, layer = Affine(3.0), backbone.network[0]
    attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("part1"), f))
    x = draw(2, 3, 4)
    gains = torch.tensor([1.0, 1.0, 3.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    assert_close(backbone({"x": x}).tokens, functional.linear(x, gains[:, None] * layer.weight, layer.bias))


def test_transforms_of_two_adapters_act_in_order_of_attachment() -> None:
    backbone = linear_backbone()
    site, layer = backbone.anatomy.site("op"), backbone.network[0]
    first, second = Affine(2.0), Affine(3.0)
    with torch.no_grad():
        first.shift.fill_(0.5)
    attach(backbone, lambda a: a.reparametrise(site, first), name="first")
    attach(backbone, lambda a: a.reparametrise(site, second), name="second")
    x = draw(2, 3, 4)
    expected = functional.linear(x, 3.0 * (2.0 * layer.weight + 0.5), layer.bias)
    assert_close(backbone({"x": x}).tokens, expected)


def test_a_missing_bias_is_computed_from_nothing() -> None:
    backbone = linear_backbone(bias=False)
    f, layer = Affine(), backbone.network[0]
    adapter = attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("op"), f, bias=True))
    with torch.no_grad():
        f.shift.fill_(0.25)
    x = draw(2, 3, 4)
    assert_close(backbone({"x": x}).tokens, functional.linear(x, layer.weight) + 0.25)
    adapter.detach()
    assert layer.bias is None
    assert_close(backbone({"x": x}).tokens, functional.linear(x, layer.weight))


@pytest.mark.parametrize("fast_path", [False, True], ids=["with gradients", "fast path"])
def test_packed_attention_reads_the_computed_weight(fast_path: bool) -> None:
    backbone = TinyCLIP()
    site, f = backbone.anatomy.site("visual.blocks.0.attn.out"), Affine(0.0)
    attach(backbone, lambda a: a.reparametrise(site, f))
    batch = backbone.example_batch()
    reference = TinyCLIP()
    with torch.no_grad():
        reference.network.visual.transformer.resblocks[0].attn.out_proj.weight.zero_()
    with torch.set_grad_enabled(not fast_path):
        # Attention's fast path differs from the slow one by 6e-7 with nothing attached.
        assert_close(backbone(batch).tokens, reference(batch).tokens, tolerance=1e-5)


def test_a_tensor_read_outside_its_modules_call_is_refused() -> None:
    backbone = TinyCLIP()
    with pytest.raises(AttachError, match="'text_projection' is read outside its module's call"):
        attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("text_projection"), Affine()))


def test_an_operation_without_a_bias_slot_is_refused() -> None:
    backbone = TinyViT()
    with pytest.raises(AttachError, match=r"'cls_token' is read outside its module's call"):
        attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("cls_token"), Affine(), bias=True))
    with pytest.raises(AttachError, match=r"'norm\.shift' has no bias slot"):
        attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("norm.shift"), Affine(), bias=True))


def test_nothing_stands_in_between_calls() -> None:
    backbone = linear_backbone()
    layer, before = backbone.network[0], snapshot(backbone.network)
    attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("op"), Affine(2.0)))
    backbone(backbone.example_batch())
    assert "weight" not in layer.__dict__
    assert_same_state(backbone.network, before)


def test_an_exception_in_the_forward_leaves_nothing_behind() -> None:
    backbone = linear_backbone()
    layer = backbone.network[0]
    attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("op"), Affine(2.0)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        backbone({"x": draw(2, 3, 5)})
    assert "weight" not in layer.__dict__


def test_a_weight_is_computed_once_per_call_of_its_owner() -> None:
    backbone = TinyViT()
    f = Calls()
    attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("blocks.0.mlp.fc1"), f))
    backbone(backbone.example_batch())
    assert f.count == 1


def test_a_checkpointed_block_computes_the_weight_again_with_the_same_gradient() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = TinyViT()
        sites = [backbone.anatomy.site(f"blocks.{i}.attn.v") for i in range(3)]
        adapter = attach(backbone, lambda a, sites=sites: [a.reparametrise(site, Affine(1.1)) for site in sites])
        backbone.blocks_for_checkpointing(enabled=checkpointing)
        loss = projection_loss(backbone(backbone.example_batch()).tokens)
        results.append(gradients(loss, adapter.parameters()))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, tolerance=1e-6)


def test_the_early_stop_of_a_recomputation_leaves_nothing_behind() -> None:
    backbone = linear_backbone()
    layer = backbone.network[0]
    attach(backbone, lambda a: a.reparametrise(backbone.anatomy.site("op"), Affine(2.0)))
    x = draw(2, 3, 4).requires_grad_()
    backbone.contexts.begin({})
    checkpoint(backbone.network, x, use_reentrant=False).sum().backward()
    assert "weight" not in layer.__dict__
