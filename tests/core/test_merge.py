"""Merging: plain weights that compute what backbone and adapters computed together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from numeric import assert_close, assert_same_state, draw, randomise, snapshot
from plain_backbone import PlainBackbone, attach
from small_networks import normalised_backbone, tied_backbone
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from torch import Tensor, nn

from peft_modal.anatomy import AnatomyBuilder, Backbone
from peft_modal.attach import LowRankUpdate, merge_
from peft_modal.errors import MergeError
from peft_modal.methods import Method
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.methods.bitfit import BitFit
from peft_modal.methods.compose import Compose
from peft_modal.methods.full import Full
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal.methods.lora import LoRA
from peft_modal.methods.norm_tuning import NormTuning
from peft_modal.methods.ssf import SSF
from peft_modal.methods.vpt import VPT

MERGEABLE: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(sites=["attn", "mlp", "conv"], rank=2),
    "ssf": SSF,
    "bitfit": BitFit,
}
BACKBONES: dict[str, Callable[[], Backbone]] = {"vit": TinyViT, "clip": TinyCLIP, "unet": TinyUNet}


def output(backbone: Backbone) -> Tensor:
    """With gradients enabled: attention's fast path differs from the slow one by 6e-7."""
    dtype = next(backbone.network.parameters()).dtype
    batch = backbone.example_batch()
    return backbone({k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}).tokens


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("order", list(permutations(MERGEABLE)), ids="-".join)
def test_the_merged_network_computes_the_same_in_whatever_order_it_was_stacked(
    order: tuple[str, ...], kind: str
) -> None:
    backbone = BACKBONES[kind]().double()
    keys = list(backbone.network.state_dict())
    for seed, name in enumerate(order):
        adapter = MERGEABLE[name]().attach(backbone, name=name).double()
        randomise(adapter, seed=seed, std=0.2)
    expected = output(backbone).detach()
    deviation = merge_(backbone)
    assert deviation == 0.0  # float64 holds the folded values exactly
    assert backbone.adapters == {}
    assert not [key for key in backbone.shared if key != "order"]
    merged = output(backbone)
    assert not merged.requires_grad
    assert_close(merged, expected, tolerance=1e-11)
    made = [key for key in backbone.network.state_dict() if key not in keys]
    assert all(key.endswith(".bias") for key in made)
    assert bool(made) == (kind != "vit")  # the others have operations without a bias, which SSF shifts


@pytest.mark.parametrize("kind", BACKBONES)
def test_merging_in_single_precision_returns_the_rounding_it_made(kind: str) -> None:
    backbone = BACKBONES[kind]()
    for name, make in MERGEABLE.items():
        randomise(make().attach(backbone, name=name), std=0.1)
    expected = output(backbone).detach()
    deviation = merge_(backbone)
    assert 0 < deviation < 1e-6
    assert_close(output(backbone).detach(), expected, tolerance=1e-5)


def test_the_deviation_is_that_of_the_coarsest_tensor() -> None:
    backbone = TinyViT()
    adapter = LoRA(sites="attn.q", rank=2).attach(backbone)
    randomise(adapter)
    backbone.network.to(torch.bfloat16)
    site = backbone.anatomy.site("blocks.0.attn.q")
    exact = []
    for i in range(3):
        update = adapter.adapter.get_submodule(f"blocks.{i}.attn.q")
        weight = backbone.network.blocks[i].attn.qkv.weight[: site.shape[0]].double()
        exact.append(weight + update.up.detach().double() @ update.down.detach().double())
    deviation = merge_(backbone)
    off = max(
        float((backbone.network.blocks[i].attn.qkv.weight[: site.shape[0]].double() - exact[i]).abs().max())
        for i in range(3)
    )
    assert deviation == pytest.approx(off, rel=1e-12)
    assert deviation > 1e-4


def test_half_an_adapter_merges_to_half() -> None:
    for method in (LoRA(sites=["attn", "mlp"], rank=2), SSF()):
        backbone = TinyCLIP().double()
        adapter = method.attach(backbone).double()
        randomise(adapter, std=0.2)
        adapter.weight = 0.5
        expected = output(backbone).detach()
        merge_(backbone)
        assert_close(output(backbone), expected, tolerance=1e-11)


def test_two_updates_of_one_module_merge_together() -> None:
    backbone = TinyViT().double()
    for seed, (name, sites) in enumerate({"slices": ["attn.q", "attn.v"], "whole": ["attn.qkv"]}.items()):
        randomise(LoRA(sites=sites, rank=2).attach(backbone, name=name).double(), seed=seed)
    expected = output(backbone).detach()
    merge_(backbone)
    assert_close(output(backbone), expected, tolerance=1e-11)


def test_merging_some_adapters_leaves_the_others_at_work() -> None:
    backbone = TinyViT().double()
    randomise(LoRA(sites="attn", rank=2).attach(backbone, name="lora").double())
    other = AdaptFormer(hidden_dim=4).attach(backbone, name="adaptformer").double()
    randomise(other, seed=9)
    expected = output(backbone).detach()
    merge_(backbone, [backbone.adapters["lora"]])
    assert list(backbone.adapters) == ["adaptformer"]
    assert_close(output(backbone).detach(), expected, tolerance=1e-11)


@pytest.mark.parametrize(
    ("merged", "stays"),
    [
        (LoRA(sites="mlp", rank=2), SSF()),
        (LoRA(sites="attn.q", rank=2), LoRA(sites="attn.v", rank=2)),
        (NormTuning(), BitFit()),
        (SSF(), Full()),
    ],
    ids=["lora-ssf", "lora-lora", "norm-bitfit", "ssf-full"],
)
def test_an_adapter_that_shares_a_module_has_to_be_merged_too(merged: Method, stays: Method) -> None:
    backbone = TinyViT()
    adapter = merged.attach(backbone, name="merged")
    stays.attach(backbone, name="stays")
    before = snapshot(backbone.network)
    with pytest.raises(MergeError, match=r"adapter 'stays' also acts on '.*'; merge both together, or detach 'stays'"):
        merge_(backbone, [adapter])
    assert_same_state(backbone.network, before)
    assert list(backbone.adapters) == ["merged", "stays"]


def test_a_leaf_above_a_computed_packed_weight_is_noticed() -> None:
    backbone = TinyCLIP()
    site = backbone.anatomy.site("visual.blocks.0.attn.out")
    lora = attach(backbone, lambda a: a.low_rank(site, LowRankUpdate(site.shape, rank=2)), name="lora")
    attach(backbone, lambda a: a.own(site), name="leaf")
    with pytest.raises(MergeError, match="adapter 'leaf' also acts on"):
        merge_(backbone, [lora])


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (VPT(num_tokens=2), "prompts in 3 blocks has no equivalent in plain weights"),
        (AdaptFormer(), r"a branch from 'blocks\.0\.mlp\.norm\.in' to 'blocks\.0\.mlp\.branch' has no equivalent"),
        (Compose(methods=[LoRA(), VPT(num_tokens=2)]), "prompts in 3 blocks has no equivalent"),
    ],
    ids=["prompts", "branch", "composed"],
)
def test_what_has_no_equivalent_is_refused_and_nothing_changes(method: Method, reason: str) -> None:
    backbone = TinyViT()
    randomise(method.attach(backbone), std=0.1)
    before, expected = snapshot(backbone.network), output(backbone)
    with pytest.raises(MergeError, match=reason):
        merge_(backbone)
    assert_same_state(backbone.network, before)
    assert torch.equal(output(backbone), expected)


def test_a_tap_is_refused_with_its_name() -> None:
    backbone = TinyViT()
    attach(backbone, lambda a: a.tap(backbone.anatomy.port("block.out", stack="blocks", block=0), "first"))
    with pytest.raises(MergeError, match=r"a tap at 'blocks\.0\.block\.out' has no equivalent"):
        merge_(backbone)


class Layers(nn.Module):
    """A convolution, a linear and two norms, none with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.linear = nn.Linear(4, 6, bias=False)
        self.norm = nn.LayerNorm(6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, 3, H, W) to (B, H', W', 6)."""
        return self.norm(self.linear(self.conv(x).movedim(1, -1)))


def bare_backbone() -> PlainBackbone:
    net = Layers().double()
    randomise(net, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        b.op("conv", "conv")
        b.op("linear", "linear")
        b.op("norm", "norm")

    return PlainBackbone(net, describe, example=(3, 6, 6))


def test_a_missing_bias_is_made_where_a_shift_folds() -> None:
    backbone = bare_backbone()
    assert "linear.bias" not in backbone.network.state_dict()
    randomise(SSF().attach(backbone).double())
    randomise(LoRA(sites=["conv", "linear"], rank=2).attach(backbone, name="lora").double())
    expected = output(backbone).detach()
    merge_(backbone)
    assert_close(output(backbone), expected, tolerance=1e-11)
    net = backbone.network
    for module in (net.conv, net.linear, net.norm):
        assert isinstance(module.bias, nn.Parameter)
        assert module.bias.dtype == torch.float64
        assert not module.bias.requires_grad


def test_a_shift_behind_a_norm_without_a_bias_slot_has_no_equivalent() -> None:
    net = nn.Sequential(nn.RMSNorm(4)).double()
    backbone = PlainBackbone(net, lambda b: b.op("norm", "0"), example=(3, 4))
    adapter = SSF().attach(backbone).double()
    randomise(adapter)
    assert len(list(adapter.parameters())) == 2
    x = draw(2, 3, 4)
    affine = adapter.adapter.get_submodule("0")
    plain = nn.functional.rms_norm(x, (4,), net[0].weight)
    assert_close(backbone({"x": x}).tokens, plain * affine.scale + affine.shift)
    with pytest.raises(MergeError, match="has no equivalent in plain weights"):
        merge_(backbone)


def test_tied_leaves_fold_into_their_one_tensor() -> None:
    backbone = tied_backbone()
    randomise(Full().attach(backbone), seed=8)
    expected = output(backbone).detach()
    merge_(backbone)
    assert_close(output(backbone), expected)
    assert backbone.network.out.weight is backbone.network.embed.weight


def test_an_update_of_one_place_of_a_tied_tensor_cannot_fold() -> None:
    backbone = tied_backbone()
    randomise(LoRA(sites="embed", rank=2).attach(backbone).double())
    before = snapshot(backbone.network)
    with pytest.raises(MergeError, match=r"'embed\.weight' and 'out\.weight' are one tensor"):
        merge_(backbone)
    assert_same_state(backbone.network, before)
    assert "default" in backbone.adapters


def test_drifted_statistics_fold_into_the_backbones_buffers() -> None:
    backbone = normalised_backbone("reference")
    LinearProbe().attach(backbone)
    backbone.train()
    backbone(backbone.example_batch(16))
    backbone.eval()
    expected = output(backbone)
    assert merge_(backbone) == 0.0
    assert torch.equal(output(backbone), expected)
    assert int(backbone.network.norm.num_batches_tracked) == 1


def test_a_trained_slice_folds() -> None:
    backbone = TinyViT().double()
    randomise(attach(backbone, lambda a: a.own(backbone.anatomy.site("blocks.0.attn.v"))).double())
    expected = output(backbone).detach()
    merge_(backbone)
    assert_close(output(backbone), expected, tolerance=1e-12)


def test_trained_entries_fold() -> None:
    backbone = TinyViT().double()
    site = backbone.anatomy.site("blocks.0.attn.v")
    randomise(attach(backbone, lambda a: a.sparse(site, torch.tensor([0, 5, 1023]))).double())
    expected = output(backbone).detach()
    assert merge_(backbone) == 0.0
    assert_close(output(backbone), expected, tolerance=1e-12)


@pytest.mark.parametrize("leave", ["disabled", "detached"])
def test_what_has_no_effect_now_is_not_folded(leave: str) -> None:
    backbone = TinyViT()
    adapter = LoRA(rank=2).attach(backbone)
    adapter.enable(on=False) if leave == "disabled" else adapter.detach()
    with pytest.raises(MergeError, match="adapter 'default' is switched off or detached; enable it, or leave it out"):
        merge_(backbone, [adapter])


def test_merging_nothing_changes_nothing() -> None:
    backbone = TinyViT()
    before = snapshot(backbone.network)
    assert merge_(backbone) == 0.0
    assert_same_state(backbone.network, before)


def test_a_quantised_tensor_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6))
    backbone = PlainBackbone(net, lambda b: b.op("op", "0"), example=(4,))
    LoRA(sites="op", rank=2).attach(backbone)
    net[0].weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MergeError, match=r"'0\.weight' is stored as torch\.int8; merge into the unquantised weights"):
        merge_(backbone)
