"""The anatomies of the test backbones and of every registered one are right, and a wrong one is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract.cases import BACKBONES, backbone_factory, registered_backbones
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_modal.anatomy import Anatomy, Backbone, Port, Segment, WeightSite
from peft_modal.methods.lora import LoRA
from peft_modal.testing import assert_anatomy, check_anatomy


@pytest.mark.parametrize("name", [*BACKBONES, *registered_backbones()])
def test_anatomy_describes_the_network(name: str) -> None:
    assert_anatomy(backbone_factory(name)())


def test_checking_leaves_the_backbone_as_it_was() -> None:
    backbone = backbone_factory("open_clip")()
    backbone.train()
    before = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in backbone.network.named_modules()}

    check_anatomy(backbone)

    assert backbone.training
    assert not backbone.adapters
    assert all(torch.equal(value, before[key]) for key, value in backbone.network.state_dict().items())
    assert {path: set(vars(module)) for path, module in backbone.network.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.network.modules())


def test_a_backbone_with_an_adapter_is_not_checked() -> None:
    backbone = backbone_factory("vit")()
    LoRA().attach(backbone, name="mine")
    assert check_anatomy(backbone) == ["adapters are attached (mine); check the bare backbone"]


def _alter(
    backbone: Backbone,
    *,
    ports: Callable[[Port], Port] = lambda port: port,
    sites: Callable[[WeightSite], WeightSite] = lambda site: site,
    **changes: Any,
) -> None:
    old = backbone.anatomy
    parts: dict[str, Any] = {
        "sites": [sites(site) for site in old.sites],
        "ports": [ports(port) for port in old.ports],
        "layouts": old.layouts,
        "depth": old.depth,
    }
    backbone.anatomy = Anatomy(**{**parts, **changes})


def _at(name: str, **changes: Any) -> Callable[[Any], Any]:
    """Change the one place of that name."""
    return lambda place: replace(place, **changes) if place.name == name else place


def _renamed(old: str, new: str) -> Callable[[Port], Port]:
    names = {old: new, new: old}

    def rename(port: Port) -> Port:
        if port.name not in names:
            return port
        return replace(port, name=names[port.name], role=names[port.name].partition("0.")[2])

    return rename


def _port_at_unknown_path(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.1.mlp.out", module="blocks.1.mpl"))


def _port_at_missing_input(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.1.block.in", item="hidden_states"))


def _port_of_wrong_width(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.1.attn.out", width=64))


def _port_on_wrong_axis(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.1.mlp.out", channel_dim=1))


def _port_outside_depth(b: Backbone) -> None:
    _alter(b, depth={"blocks": 2})


def _ports_in_wrong_order(b: Backbone) -> None:
    ports = list(b.anatomy.ports)
    here = [port.name for port in ports].index("blocks.0.attn.norm.out")
    ports[here], ports[here + 1] = ports[here + 1], ports[here]
    _alter(b)
    b.anatomy.ports = tuple(ports)


def _branch_taken_from_stream(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.0.mlp.branch", module="blocks.0.norm2", side="in"))


def _stream_taken_from_branch(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.0.block.out", module="blocks.0.drop_path2"))


def _out_and_branch_swapped(b: Backbone) -> None:
    _alter(b, ports=_renamed("blocks.0.attn.out", "blocks.0.attn.branch"))


def _module_called_twice(b: Backbone) -> None:
    b.network.blocks[0].norm2 = b.network.blocks[0].norm1


def _module_never_called(b: Backbone) -> None:
    _alter(
        b, sites=_at("visual.blocks.0.attn.out", owner="visual.transformer.resblocks.0.attn.out_proj", reach=_CALLED)
    )


def _site_of_unknown_tensor(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.mlp.fc1", tensor="kernel"))


def _site_at_unknown_path(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.mlp.fc1", holder="blocks.0.mlp.fc3"))


def _site_of_wrong_shape(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.mlp.fc1", shape=(32, 64)))


def _site_without_bias_slot(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.mlp.fc1", bias="beta"))


def _site_on_wrong_axis(b: Backbone) -> None:
    _alter(b, sites=_at("patch_embed.proj", out_dim=-1))


def _bias_on_wrong_axis(b: Backbone) -> None:
    _alter(b, sites=_at("patch_embed.proj.bias", out_dim=-1))


def _heads_do_not_divide(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.attn.q", heads=5))


def _slices_with_gap(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.attn.k", rows=(33, 64), shape=(31, 32)))


def _slices_with_overlap(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.attn.k", rows=(31, 64), shape=(33, 32)))


def _slices_too_short(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.attn.v", rows=(64, 95), shape=(31, 32)))


def _parts_in_other_order(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.attn.qkv", parts=("blocks.0.attn.k", "blocks.0.attn.q", "blocks.0.attn.v")))


def _slices_without_whole(b: Backbone) -> None:
    _alter(b)
    b.anatomy.sites = tuple(site for site in b.anatomy.sites if site.name != "blocks.0.attn.qkv")


def _tensor_read_outside_its_owner(b: Backbone) -> None:
    _alter(b, sites=_at("text_projection", reach=frozenset({"weight", "leaf"})))


def _tensor_never_read(b: Backbone) -> None:
    scale = WeightSite(
        name="logit_scale", role="scale", stack="text", block=None, holder="", tensor="logit_scale", owner="", op="raw",
        shape=(), reach=frozenset({"leaf"}),
    )  # fmt: skip
    _alter(b, sites=lambda site: site)
    b.anatomy.sites = (*b.anatomy.sites, scale)


def _recomputed_without_hooks(b: Backbone) -> None:
    """The block runs its own body again, past its hooks: what stood in for its weights is gone by then."""
    _alter(b, sites=_at("blocks.0.mlp.fc1", owner="blocks.0", reach=frozenset({"weight", "leaf"})))
    block = b.network.blocks[0]
    body = block.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(body, x, use_reentrant=False) if b.network.grad_checkpointing else body(x)

    block.forward = forward


def _coupled_to_nothing(b: Backbone) -> None:
    _alter(b, sites=_at("blocks.0.mlp.fc1", coupled=("blocks.0.mlp.fc3",)))


def _always_trained_without_leaf(b: Backbone) -> None:
    _alter(b, sites=_at("cls_token", reach=frozenset()), always_trained=("cls_token",))


def _layout_with_too_many_tokens(b: Backbone) -> None:
    layout = b.anatomy.layouts["blocks"]
    _alter(b, layouts={"blocks": replace(layout, segments=(Segment("cls", 17), Segment("patches", None)))})


def _prompt_index_outside(b: Backbone) -> None:
    _alter(b, layouts={"blocks": replace(b.anatomy.layouts["blocks"], prompt_index=40)})


def _no_prompts_for_no_reason(b: Backbone) -> None:
    _alter(b, layouts={"blocks": replace(b.anatomy.layouts["blocks"], prompt_index=None)})


def _prompts_without_tokens_port(b: Backbone) -> None:
    _alter(b, ports=_at("blocks.2.block.out", allows=frozenset({"read", "add"})))


def _network_with_active_dropout(b: Backbone) -> None:
    b.network.pos_drop = _AlwaysDropping()


def _trainable_backbone(b: Backbone) -> None:
    b.network.cls_token.requires_grad_(requires_grad=True)


def _tensor_beside_the_network(b: Backbone) -> None:
    b.register_parameter("temperature", nn.Parameter(torch.ones(1), requires_grad=False))


def _statistics_that_move(b: Backbone) -> None:
    b.network.norm_pre = _Counting()


def _feature_width_wrong(b: Backbone) -> None:
    b.network.num_features = 48


def _example_batch_ignores_size(b: Backbone) -> None:
    original = b.example_batch
    b.example_batch = lambda _size=2: original(2)


def _forward_fails(b: Backbone) -> None:
    b.example_batch = lambda _size=2: {"picture": torch.zeros(2)}


def _checkpointing_without_effect(b: Backbone) -> None:
    b.blocks_for_checkpointing = lambda **_switch: None


class _AlwaysDropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.1, training=True)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x


_CALLED = frozenset({"call", "weight", "leaf"})

DAMAGES: dict[str, tuple[str, Callable[[Backbone], None], str]] = {
    "port at an unknown path": ("vit", _port_at_unknown_path, "no module 'blocks.1.mpl'"),
    "port at a missing input": ("vit", _port_at_missing_input, "input 'hidden_states' of 'blocks.1' is NoneType"),
    "port of wrong width": ("vit", _port_of_wrong_width, "'blocks.1.attn.out': the anatomy says 64 channels"),
    "port on a wrong axis": ("vit", _port_on_wrong_axis, "says 32 channels on axis 1 of a tensor of shape (2, 17, 32)"),
    "port in a block too many": ("vit", _port_outside_depth, "lies in block 2, but stack 'blocks' has 2 blocks"),
    "ports in wrong order": ("vit", _ports_in_wrong_order, "'blocks.0.attn.norm.out' is listed after"),
    "branch taken from the stream": ("vit", _branch_taken_from_stream, "'block.out' is not 'block.in' plus the"),
    "stream taken from a branch": ("vit", _stream_taken_from_branch, "'block.out' is not 'block.in' plus the"),
    "out and branch swapped": ("vit", _out_and_branch_swapped, "'attn.out' lies before 'attn.branch'"),
    "module called twice": ("vit", _module_called_twice, "'blocks.0.norm1' is called 2 times"),
    "module never called": ("open_clip", _module_never_called, "resblocks.0.attn.out_proj' is never"),
    "site of an unknown tensor": ("vit", _site_of_unknown_tensor, "'blocks.0.mlp.fc1' has no tensor 'kernel'"),
    "site at an unknown path": ("vit", _site_at_unknown_path, "no module 'blocks.0.mlp.fc3' (holder)"),
    "site of wrong shape": ("vit", _site_of_wrong_shape, "says shape (32, 64), the network has (64, 32)"),
    "site without bias slot": ("vit", _site_without_bias_slot, "has no bias slot 'beta'"),
    "site on a wrong axis": ("vit", _site_on_wrong_axis, "site 'patch_embed.proj': the anatomy says 32 channels"),
    "bias on a wrong axis": ("vit", _bias_on_wrong_axis, "out_dim is -1, that of its operation is 1"),
    "heads that do not divide": ("vit", _heads_do_not_divide, "32 rows cannot be split into 5 heads"),
    "slices with a gap": ("vit", _slices_with_gap, "'blocks.0.attn.k': rows 33..64 leave a gap"),
    "slices that overlap": ("vit", _slices_with_overlap, "'blocks.0.attn.k': rows 31..64 overlap"),
    "slices too short": ("vit", _slices_too_short, "its slices end at row 95, the tensor has 96"),
    "parts in another order": ("vit", _parts_in_other_order, "its parts are blocks.0.attn.k, blocks.0.attn.q"),
    "slices without the whole": ("vit", _slices_without_whole, "but no site for the whole tensor"),
    "tensor read outside its owner": ("open_clip", _tensor_read_outside_its_owner, "'text_projection' has reach"),
    "tensor never read": ("open_clip", _tensor_never_read, "'logit_scale' has reach 'leaf', but"),
    "recomputed without hooks": ("vit", _recomputed_without_hooks, "with gradient checkpointing"),
    "coupled to nothing": ("vit", _coupled_to_nothing, "coupled to 'blocks.0.mlp.fc3', which does not exist"),
    "always trained without leaf": ("vit", _always_trained_without_leaf, "its reach must have 'leaf'"),
    "layout with too many tokens": ("vit", _layout_with_too_many_tokens, "no sequence of 17 fixed tokens"),
    "prompt index outside": ("vit", _prompt_index_outside, "prompt_index 40 lies outside"),
    "no prompts for no reason": ("vit", _no_prompts_for_no_reason, "takes no prompts and gives no reason"),
    "prompts without a tokens port": ("vit", _prompts_without_tokens_port, "block 2 has no 'block.out' port"),
    "network with active dropout": ("vit", _network_with_active_dropout, "in eval mode give different tokens"),
    "trainable backbone": ("vit", _trainable_backbone, "a parameter of the network requires a gradient"),
    "tensor beside the network": ("vit", _tensor_beside_the_network, "(temperature); nobody would save them"),
    "statistics that move in eval": ("vit", _statistics_that_move, "in eval mode changes 'norm_pre.count'"),
    "feature width wrong": ("vit", _feature_width_wrong, "feature_width is 48, but the tokens have shape (2, 17, 32)"),
    "example batch of fixed size": ("vit", _example_batch_ignores_size, "example_batch(3) gives features of 2 samples"),
    "forward that fails": ("vit", _forward_fails, "fails with KeyError: 'image'"),
    "checkpointing without effect": ("vit", _checkpointing_without_effect, "has no effect"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_anatomy_is_found_out(damage: str) -> None:
    name, harm, sentence = DAMAGES[damage]
    backbone = backbone_factory(name)()
    harm(backbone)

    problems = check_anatomy(backbone)

    assert any(sentence in problem for problem in problems), problems
    with pytest.raises(AssertionError, match=f"the anatomy of {type(backbone).__name__} is wrong"):
        assert_anatomy(backbone)
