"""Trained tensors: leaves stand in, the backbone's own stay as loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import assert_close, assert_same_state, draw, gradients, projection_loss, randomise, snapshot
from plain_backbone import PlainBackbone, attach
from small_networks import Normalised, normalised_backbone, tied_backbone
from tiny_backbones import TinyCLIP, TinyViT
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.errors import AttachError
from peft_modal.methods.compose import Compose
from peft_modal.methods.full import Full
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal.methods.norm_tuning import NormTuning


def test_training_the_leaf_moves_the_output_and_not_the_backbone() -> None:
    backbone = TinyViT()
    before, batch = snapshot(backbone.network), backbone.example_batch()
    plain = backbone(batch).tokens
    adapter = attach(backbone, lambda a: a.own(backbone.anatomy.site("blocks.1.mlp.fc1")))
    assert torch.equal(backbone(batch).tokens, plain)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    projection_loss(backbone(batch).tokens).backward()
    optimizer.step()
    assert not torch.equal(backbone(batch).tokens, plain)
    assert_same_state(backbone.network, before)
    adapter.detach()
    assert torch.equal(backbone(batch).tokens, plain)


def test_the_gradient_is_that_of_the_tensor_trained_in_place() -> None:
    names = ["blocks.0.attn.qkv.weight", "blocks.1.norm1.bias", "cls_token", "pos_embed", "norm.weight"]
    backbone = TinyViT()
    adapter = attach(backbone, lambda a: [a.own_tensor(name) for name in names])
    batch = backbone.example_batch()
    got = gradients(projection_loss(backbone(batch).tokens), adapter.parameters())
    reference = TinyViT()
    own = [
        reference.network.get_parameter(name).requires_grad_()
        for name, _ in adapter.backbone_tensors.named_parameters()
    ]
    wanted = gradients(projection_loss(reference(batch).tokens), own)
    assert len(got) == len(wanted) == 5
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, tolerance=1e-6)


def test_tied_weights_share_one_leaf() -> None:
    backbone = tied_backbone()
    adapter = attach(backbone, lambda a: a.own(backbone.anatomy.site("embed")))
    leaf = adapter.backbone_tensors.get_parameter("embed.weight")
    with torch.no_grad():
        leaf.mul_(2.0)
    x = draw(2, 3, 4).requires_grad_()
    actual = backbone({"x": x}).tokens
    expected = functional.linear(x, leaf) ** 2
    assert_close(actual, expected)
    for got, wanted in zip(
        gradients(projection_loss(actual), [x, leaf]), gradients(projection_loss(expected), [x, leaf]), strict=True
    ):
        assert_close(got, wanted)
    assert adapter.counts() == {"adapter": 0, "backbone": 24, "training_only": 0}
    assert list(adapter.state()) == ["backbone.embed.weight"]


def test_full_fine_tuning_trains_every_parameter_once() -> None:
    backbone = tied_backbone()
    adapter = Full().attach(backbone)
    assert list(adapter.named_trained()) == ["backbone.embed.weight"]
    vit = TinyViT()
    counted = Full().attach(vit).counts()
    size = sum(p.numel() for p in vit.network.parameters())
    assert counted == {"adapter": 0, "backbone": size, "training_only": 0}


def test_owning_both_names_of_a_tied_weight_makes_one_leaf() -> None:
    backbone = tied_backbone()
    leaves = []
    adapter = attach(backbone, lambda a: leaves.extend(a.own(backbone.anatomy.site(n)) for n in ("embed", "out")))
    assert leaves[0] is leaves[1]
    assert adapter.counts() == {"adapter": 0, "backbone": 24, "training_only": 0}


def test_owning_a_tensor_twice_is_refused_under_another_scope_too() -> None:
    backbone = TinyViT()
    with pytest.raises(AttachError, match=r"'blocks\.0\.norm1\.weight' is trained twice by one adapter"):
        Compose(methods=[NormTuning(), NormTuning()]).attach(backbone)
    with pytest.raises(AttachError, match=r"'norm\.weight' is trained twice by one adapter"):
        attach(backbone, lambda a: [a.own_tensor("norm.weight"), a.own_tensor("norm.weight")])


def test_a_slice_is_trained_alone() -> None:
    backbone = TinyViT()
    adapter = attach(backbone, lambda a: a.own(backbone.anatomy.site("blocks.0.attn.k")))
    (leaf,) = adapter.parameters()
    whole = backbone.network.blocks[0].attn.qkv.weight
    assert torch.equal(leaf, whole[32:64])
    randomise(adapter)
    batch = backbone.example_batch()
    actual = backbone(batch).tokens
    reference = TinyViT()
    with torch.no_grad():
        reference.network.blocks[0].attn.qkv.weight[32:64] = leaf
    assert_close(actual, reference(batch).tokens, tolerance=1e-6)
    assert adapter.counts() == {"adapter": 0, "backbone": 32 * 32, "training_only": 0}
    assert torch.equal(whole, TinyViT().network.blocks[0].attn.qkv.weight)


def test_a_tensor_read_outside_every_call_is_trained_too() -> None:
    backbone = TinyCLIP()
    adapter = attach(backbone, lambda a: a.own(backbone.anatomy.site("text_projection")))
    (leaf,) = adapter.parameters()
    (gradient,) = gradients(projection_loss(backbone(backbone.example_batch()).tokens), [leaf])
    assert gradient.abs().max() > 0


def test_moving_the_adapter_points_the_stand_ins_at_the_moved_tensors() -> None:
    backbone = normalised_backbone("reference")
    adapter = attach(backbone, lambda a: a.own_tensor("linear.weight"))
    backbone.double()
    adapter.to(torch.float64)
    linear, norm = backbone.network.linear, backbone.network.norm
    assert linear.weight is adapter.backbone_tensors.get_parameter("linear.weight")
    assert norm.running_mean is adapter.backbone_tensors.get_buffer("norm.running_mean")
    assert linear.weight.dtype == norm.running_mean.dtype == torch.float64
    adapter.train()
    backbone.train()
    output = backbone(backbone.example_batch(8)).tokens
    assert output.dtype == torch.float64
    assert norm.running_mean is adapter.backbone_tensors.get_buffer("norm.running_mean")
    assert adapter.backbone_tensors.get_buffer("norm.running_mean").abs().max() > 0
    (gradient,) = gradients(projection_loss(output), adapter.parameters())
    assert gradient.dtype == torch.float64


def test_moving_a_disabled_adapter_hangs_nothing() -> None:
    backbone = TinyViT()
    adapter = attach(backbone, lambda a: a.own_tensor("norm.weight"))
    adapter.enable(on=False)
    adapter.to(torch.float64)
    assert "weight" not in backbone.network.norm.__dict__
    adapter.to(torch.float32).enable()
    assert backbone.network.norm.weight is adapter.backbone_tensors.get_parameter("norm.weight")


def test_reference_mode_lets_the_adapters_statistics_drift_and_not_the_backbones() -> None:
    backbone = normalised_backbone("reference")
    before = snapshot(backbone.network)
    adapter = LinearProbe().attach(backbone)
    assert sorted(adapter.state()) == [
        "backbone.norm.num_batches_tracked", "backbone.norm.running_mean", "backbone.norm.running_var",
    ]  # fmt: skip
    backbone.train()
    x = backbone.example_batch(16)
    output = backbone(x).tokens
    reference = Normalised()
    reference.load_state_dict(before)
    assert torch.equal(output, reference.train()(x["x"]))
    assert_same_state(backbone.network, before)
    for name, value in reference.norm.named_buffers():
        assert torch.equal(adapter.state()[f"backbone.norm.{name}"], value)
    assert int(adapter.state()["backbone.norm.num_batches_tracked"]) == 1
    backbone.eval()
    assert torch.equal(backbone(x).tokens, reference.eval()(x["x"]))
    assert adapter.counts() == {"adapter": 0, "backbone": 0, "training_only": 0}


def test_eval_mode_keeps_statistics_still_while_training() -> None:
    backbone = normalised_backbone("eval")
    before = snapshot(backbone.network)
    adapter = LinearProbe().attach(backbone)
    backbone.train()
    backbone(backbone.example_batch(16))
    assert adapter.state() == {}
    assert_same_state(backbone.network, before)


def test_two_adapters_in_reference_mode_share_one_set_of_statistics() -> None:
    backbone = normalised_backbone("reference")
    first = LinearProbe().attach(backbone, name="first")
    second = LinearProbe().attach(backbone, name="second")
    assert first.state()
    assert not second.state()


def test_what_the_anatomy_declares_is_trained_with_every_method_once() -> None:
    def describe(b: AnatomyBuilder) -> None:
        b.op("linear", "linear")
        b.op("norm", "norm")

    backbone = PlainBackbone(Normalised(), describe, example=(4,), always_trained=["norm.shift"])
    assert list(LinearProbe().attach(backbone).named_trained()) == ["backbone.norm.bias"]
    assert list(LinearProbe().attach(backbone, name="second").named_trained()) == []


def test_undecayed_sites_are_listed() -> None:
    backbone = TinyViT()
    adapter = attach(
        backbone, lambda a: [a.own(backbone.anatomy.site("cls_token")), a.own(backbone.anatomy.site("pos_embed"))]
    )
    assert adapter.decay == {"backbone.cls_token": False}
    assert set(adapter.decay) <= set(adapter.named_trained())


def test_an_integer_tensor_cannot_be_trained() -> None:
    backbone = normalised_backbone("eval")
    with pytest.raises(AttachError, match=r"is stored as torch\.int64 and cannot be trained"):
        attach(backbone, lambda a: a.own_tensor("norm.num_batches_tracked"))


def test_a_method_that_does_not_propagate_trains_no_tensor() -> None:
    backbone = TinyViT()
    with pytest.raises(AttachError, match="so a trained tensor in it would get no gradient"):
        attach(backbone, lambda a: a.own_tensor("norm.weight"), propagates=False)


def test_a_tensor_assigned_by_other_code_is_noticed_at_detach() -> None:
    backbone = TinyViT()
    adapter = attach(backbone, lambda a: a.own_tensor("norm.weight"))
    backbone.network.norm.weight = nn.Parameter(torch.ones(32))
    with pytest.raises(AttachError, match=r"'norm\.weight' was assigned by other code while an adapter trained it"):
        adapter.detach()


def test_the_later_of_two_adapters_on_one_tensor_wins_until_it_goes() -> None:
    backbone = TinyViT()
    first = attach(backbone, lambda a: a.own_tensor("norm.weight"), name="first")
    second = attach(backbone, lambda a: a.own_tensor("norm.weight"), name="second")
    norm = backbone.network.norm
    assert norm.weight is second.backbone_tensors.get_parameter("norm.weight")
    first.detach()
    assert norm.weight is second.backbone_tensors.get_parameter("norm.weight")
    second.detach()
    assert norm.weight is backbone.tensor("norm.weight")


def test_an_adapter_knows_what_it_trains() -> None:
    backbone = tied_backbone()
    adapter = attach(backbone, lambda a: a.own_tensor("embed.weight"))
    assert adapter.owns("embed.weight")
    assert adapter.owns("out.weight")
    assert not adapter.owns("embed.bias")


def test_a_copy_of_backbone_and_adapter_points_at_its_own_leaves() -> None:
    backbone = TinyViT()
    adapter = attach(backbone, lambda a: a.own_tensor("norm.weight"))
    other, twin = copy.deepcopy((backbone, adapter))
    assert other.network.norm.weight is twin.backbone_tensors.get_parameter("norm.weight")
    assert other.network.norm.weight is not backbone.network.norm.weight


class TwoNames(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(4))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return x * self.first + self.second


def test_two_names_in_one_module_share_the_leaf_too() -> None:
    backbone = PlainBackbone(TwoNames(), lambda b: b.raw("x", "first"), example=(4,))
    adapter = attach(backbone, lambda a: a.own_tensor("first"))
    with torch.no_grad():
        next(adapter.parameters()).fill_(3.0)
    x = draw(2, 4, dtype=torch.float32)
    assert torch.equal(backbone({"x": x}).tokens, x * 3.0 + 3.0)
