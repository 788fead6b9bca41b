"""Selecting sites and ports, and the sentences behind what cannot be selected."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from torch import nn

from peft_modal.anatomy import Anatomy, AnatomyBuilder, Selector, adopt_biases
from peft_modal.errors import SelectionError

VIT = TinyViT().anatomy
CLIP = TinyCLIP().anatomy
UNET = TinyUNet().anatomy


def names(anatomy: Anatomy, value: object, **options: object) -> list[str]:
    options = {"needs": "leaf", **options}
    return [site.name for site in anatomy.select(Selector.parse(value), **options)]


def test_a_role_selects_its_sites_in_order_of_execution() -> None:
    assert names(VIT, "mlp.in") == [f"blocks.{i}.mlp.fc1" for i in range(3)]


def test_a_whole_fused_tensor_is_left_out_unless_named_exactly() -> None:
    slices = names(VIT, {"roles": "attn", "blocks": 0})
    assert slices == ["blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v", "blocks.0.attn.proj"]
    assert names(VIT, {"roles": "attn.qkv", "blocks": 0}) == ["blocks.0.attn.qkv"]


def test_fused_prefers_the_whole_tensor_to_its_slices() -> None:
    assert names(VIT, {"roles": "attn", "blocks": 0}, fused=True) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]


def test_fused_keeps_a_slice_that_is_named_alone() -> None:
    assert names(VIT, {"roles": "attn.q", "blocks": 0}, fused=True) == ["blocks.0.attn.q"]


def test_the_slices_of_a_fused_tensor_tile_its_rows() -> None:
    whole = VIT.site("blocks.1.attn.qkv")
    parts = [VIT.site(name) for name in whole.parts]
    assert [part.rows for part in parts] == [(0, 32), (32, 64), (64, 96)]
    assert whole.rows is None
    assert {part.path for part in parts} == {whole.path}


def test_blocks_count_per_stack() -> None:
    found = names(CLIP, {"roles": "mlp.in", "blocks": "last: 1"})
    assert found == ["visual.blocks.1.mlp.in", "text.blocks.1.mlp.in"]
    assert names(CLIP, {"roles": "mlp.in", "stacks": "text", "blocks": -1}) == ["text.blocks.1.mlp.in"]


def test_a_stack_selects_the_stacks_below_it() -> None:
    chosen = UNET.select(Selector.parse({"roles": "cross.q", "stacks": "unet"}), needs="call")
    assert {site.stack for site in chosen} == {"unet.down", "unet.mid", "unet.up"}


def test_sites_outside_every_block_are_left_out_by_a_block_selection() -> None:
    assert "norm" in names(VIT, "norm")
    assert "norm" not in names(VIT, {"roles": "norm", "blocks": "0:"})


def test_a_path_selects_by_name() -> None:
    assert names(VIT, {"path": r"^blocks\.2\.mlp\.fc2$"}) == ["blocks.2.mlp.fc2"]


def test_a_site_out_of_reach_is_refused_with_what_it_allows() -> None:
    with pytest.raises(SelectionError) as caught:
        names(CLIP, {"roles": "attn.q", "stacks": "text"}, needs="call")
    assert str(caught.value) == (
        "2 of 2 selected sites cannot be acted on by call (text.blocks.0.attn.q, text.blocks.1.attn.q); "
        "they allow leaf, weight"
    )


def test_one_of_several_needs_suffices() -> None:
    assert len(names(CLIP, {"roles": "attn.q", "stacks": "text"}, needs=("call", "weight"))) == 2


def test_optional_leaves_out_what_cannot_be_reached() -> None:
    everything = names(CLIP, ["attn.q", "mlp.in"], needs="leaf")
    reachable = names(CLIP, ["attn.q", "mlp.in"], needs="call", optional=True)
    assert reachable == [name for name in everything if name.endswith("mlp.in")]


def test_an_optional_selection_that_reaches_nothing_is_still_an_error() -> None:
    with pytest.raises(SelectionError, match="no sites match"):
        names(CLIP, "attn.q", needs="call", optional=True)


def test_a_role_that_does_not_exist_names_the_nearest_and_all_roles() -> None:
    with pytest.raises(SelectionError) as caught:
        names(VIT, "atn.q")
    sentence = str(caught.value)
    assert sentence.startswith("no sites match roles=('atn.q',) (did you mean 'attn.q'")
    assert "roles here: attn.k, attn.out, attn.q, attn.qkv, attn.v, bias.attn.out" in sentence
    assert sentence.endswith("stacks: blocks")


def test_a_role_that_exists_in_other_blocks_only_gets_no_misleading_hint() -> None:
    with pytest.raises(SelectionError) as caught:
        names(VIT, {"roles": "embed", "blocks": 0})
    assert "did you mean" not in str(caught.value)


def test_no_port_matches_lists_the_roles_of_ports() -> None:
    with pytest.raises(SelectionError, match=r"no ports match .*did you mean 'mlp.out'.*roles here: attn\.branch"):
        VIT.select_ports(Selector.parse("mlp.outt"), needs="read")


def test_a_port_that_does_not_allow_the_access_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"port 'text\.0\.block\.in' allows add, read, replace, not 'tokens'"):
        CLIP.select_ports(Selector.parse({"roles": "block.in", "stacks": "text"}), needs="tokens")


def test_the_partner_of_a_port_lies_in_the_same_block() -> None:
    partner = VIT.port("block.out", stack="blocks", block=1)
    assert (partner.name, partner.module, partner.side) == ("blocks.1.block.out", "blocks.1", "out")


def test_a_missing_partner_lists_what_the_block_has() -> None:
    with pytest.raises(
        SelectionError, match=r"block 1 of 'blocks' has no port 'cross\.out'; it has attn\.branch, attn"
    ):
        VIT.port("cross.out", stack="blocks", block=1)
    with pytest.raises(SelectionError, match=r"'blocks' outside its blocks has no port 'block\.in'"):
        VIT.port("block.in", stack="blocks", block=None)


def test_an_unknown_site_names_the_nearest() -> None:
    with pytest.raises(SelectionError, match=r"no site 'blocks\.0\.mlp\.fc3'; did you mean 'blocks\.0\.mlp\.fc"):
        VIT.site("blocks.0.mlp.fc3")


def test_the_output_of_a_called_operation_is_a_port_with_its_channel_axis() -> None:
    conv = UNET.output_port(UNET.site("unet.conv_in"))
    assert (conv.channel_dim, conv.width) == (1, 8)
    with pytest.raises(SelectionError, match="read inside a function"):
        CLIP.output_port(CLIP.site("visual.blocks.0.attn.q"))


def test_a_stack_without_tokens_has_no_layout() -> None:
    assert VIT.layout(VIT.port("block.in", stack="blocks", block=0)).prompt_index == 1
    with pytest.raises(SelectionError, match="carries no token sequence"):
        UNET.layout(UNET.select_ports(Selector.parse("block.in"), needs="read")[0])


def test_two_sites_of_one_name_are_a_mistake_of_the_anatomy() -> None:
    builder = AnatomyBuilder(nn.Sequential(nn.Linear(2, 2)))
    builder.op("a", "0", name="x")
    builder.op("b", "0", name="x")
    with pytest.raises(ValueError, match="two sites are called 'x'"):
        builder.build(layouts={})


def test_the_builder_reads_shapes_axes_and_bias_slots_off_the_modules() -> None:
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Linear(3, 5, bias=False), nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, affine=False),
        nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Embedding(7, 3),
    )  # fmt: skip
    builder = AnatomyBuilder(net)
    for i in range(len(net)):
        builder.op(f"op{i}", str(i))
    sites = {site.name: site for site in builder.build(layouts={}).sites}
    assert sites["0"].shape == (5, 3)
    assert sites["0.bias"].role == "bias.op0"
    assert sites["1"].bias == "bias"  # a slot without a value
    assert "1.bias" not in sites
    assert (sites["2"].op, sites["2"].out_dim, sites["2"].shape) == ("conv", 1, (4, 2, 3))
    assert "3" not in sites
    assert (sites["4"].role, sites["4"].out_dim) == ("op4.scale", 1)
    assert (sites["5.shift"].role, sites["5.shift"].out_dim) == ("op5.shift", -1)
    assert sites["6"].reach == {"weight", "leaf"}


def test_the_builder_refuses_a_module_it_cannot_read() -> None:
    with pytest.raises(TypeError, match=r"Sequential is no linear, convolution, norm or embedding; add it with raw"):
        AnatomyBuilder(nn.Sequential(nn.Sequential())).op("x", "0")


def test_no_parameter_of_a_backbone_requires_a_gradient() -> None:
    assert not any(p.requires_grad for p in TinyViT().parameters())


@pytest.mark.parametrize(("mode", "network_trains"), [("eval", False), ("reference", True)])
def test_the_frozen_network_follows_the_mode_only_in_reference(mode: str, network_trains: bool) -> None:
    backbone = TinyViT(frozen_mode=mode)
    assert not backbone.network.training
    backbone.train()
    assert backbone.training
    assert backbone.network.training is network_trains
    backbone.eval()
    assert not backbone.network.training


def test_a_tensor_is_read_past_what_stands_in_for_it() -> None:
    backbone = TinyViT()
    own = backbone.network.norm.weight
    backbone.network.norm.__dict__["weight"] = torch.zeros(32)
    assert backbone.tensor("norm.weight") is own
    with pytest.raises(KeyError):
        backbone.tensor("norm.nothing")


def test_a_bias_that_a_file_holds_fills_an_empty_slot_only() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2), nn.RMSNorm(2))
    kept = net[1].bias
    adopt_biases(net, {f"{place}.bias": torch.ones(width) for place, width in ((0, 4), (1, 2), (2, 2), (9, 1))})
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    assert net[0].bias.shape == (4,)
    assert not net[0].bias.requires_grad
    assert net[1].bias is kept


def test_copies_of_a_backbone_share_the_places_that_never_change() -> None:
    backbone = TinyViT(depth=1)
    twin = copy.deepcopy(backbone)
    assert twin.anatomy is not backbone.anatomy
    for places, others in ((twin.anatomy.sites, backbone.anatomy.sites), (twin.anatomy.ports, backbone.anatomy.ports)):
        assert all(place is other for place, other in zip(places, others, strict=True))
