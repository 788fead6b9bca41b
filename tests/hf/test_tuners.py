"""Every bridged tuner computes what peft computes, and keeps the contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import assert_close, projection_loss, randomise
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from tuner_cases import TUNER_ARGUMENTS

from peft_modal.attach import merge_
from peft_modal.errors import AttachError, ConfigError
from peft_modal.hf.layers import environment_kept
from peft_modal.hf.tuners import PRESETS, REFUSED, TUNERS
from peft_modal.methods.hf import HF
from peft_modal.methods.lora import LoRA
from peft_modal.testing import CONTRACTS
from peft_modal.testing.sandbox import outputs, shift


def vit() -> TinyViT:
    backbone = TinyViT(depth=1)
    randomise(backbone.network, std=0.1)  # timm's biases are zero, which would hide what a tuner does to them
    return backbone


def injected(method: HF, targets: list[str]) -> torch.nn.Module:
    """Peft's own tuner on a network of the same weights."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    network = vit().network
    config = method.settings.peft_config(targets, feedforward=[name for name in targets if name.endswith("fc2")])
    with environment_kept():
        PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](network, config, "default")
    return network


def layers(backbone: Any, adapter: Any) -> dict[str, Any]:
    """Our copies of peft's layers, by module path."""
    return {s.holder: adapter.adapter.get_submodule(s.name).tuner for s in backbone.anatomy.sites if s.op == "linear"
            and s.rows is None}  # fmt: skip


@pytest.mark.parametrize("tuner", TUNER_ARGUMENTS)
def test_outputs_and_gradients_are_those_of_peft_on_a_copy_of_the_network(tuner: str) -> None:
    backbone, method = vit(), HF(tuner=tuner, config=TUNER_ARGUMENTS[tuner])
    adapter = method.attach(backbone)
    ours = layers(backbone, adapter)
    theirs = injected(method, list(ours))
    shift(adapter)
    theirs_by_name = {}
    with torch.no_grad():
        for path, layer in ours.items():
            target = theirs.get_submodule(path)
            values = layer.state_dict()
            own = {name: value for name, value in target.state_dict().items() if not name.startswith("base_layer.")}
            assert set(own) <= set(values)
            for name, value in own.items():
                value.copy_(values[name])
            theirs_by_name |= {id(dict(layer.named_parameters())[n]): p for n, p in target.named_parameters()
                               if n in dict(layer.named_parameters())}  # fmt: skip
    batch = backbone.example_batch()

    output = backbone(batch).tokens
    expected = theirs.forward_features(batch["image"])

    assert_close(output, expected, tolerance=1e-5)
    projection_loss(output).backward()
    projection_loss(expected).backward()
    largest = max(float(p.grad.abs().max()) for p in theirs_by_name.values() if p.grad is not None)
    for parameter in adapter.parameters():
        other = theirs_by_name[id(parameter)]
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None:
            assert float((parameter.grad - other.grad).abs().max()) <= 1e-4 * largest


@pytest.mark.parametrize("contract", ["identity_at_init", "save_load_round_trip", "merge_equals_unmerged",
                                      "copy_and_pickle", "detach_restores_every_bit"])  # fmt: skip
@pytest.mark.parametrize("tuner", TUNER_ARGUMENTS)
def test_contract_holds(tuner: str, contract: str) -> None:
    CONTRACTS[contract](vit, HF(tuner=tuner, config=TUNER_ARGUMENTS[tuner]))


@pytest.mark.parametrize("tuner", [t for t in TUNER_ARGUMENTS if t not in {*PRESETS, "tinylora"} and TUNERS[t].init])
def test_another_initialisation_declares_that_it_is_no_identity(tuner: str) -> None:
    method = HF(tuner=tuner, config={**TUNER_ARGUMENTS[tuner], TUNERS[tuner].init: False})
    assert not method.identity_at_init
    CONTRACTS["identity_at_init"](vit, method)


def test_an_uninitialised_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_weights: with false peft leaves tinylora's vector uninitialised"):
        HF(tuner="tinylora", config={"init_weights": False})


def test_every_type_of_peft_is_bridged_or_refused_with_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    types = {kind.value.lower() for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert types == set(TUNERS) | set(REFUSED)
    assert not set(TUNERS) & set(REFUSED)


def test_every_bridged_tuner_and_preset_is_tried() -> None:
    assert set(TUNERS) | set(PRESETS) - {"rslora", "corda", "eva"} == set(TUNER_ARGUMENTS)


# The weights of the network


def test_a_start_from_the_weights_leaves_the_networks_weights_alone_and_reads_its_residual_from_the_file() -> None:
    backbone = vit()
    before = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    adapter = HF(tuner="pissa", config={"r": 4}).attach(backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.network.state_dict().items())
    down = adapter.state()["adapter.blocks.0.attn.qkv.tuner.lora_A.default.weight"]
    start = adapter.state()["adapter.blocks.0.attn.qkv.start.down"]
    assert torch.equal(down, start)
    assert float(down.abs().max()) > 0


def test_the_adapter_holds_no_tensor_of_the_network() -> None:
    backbone = vit()
    adapter = HF(tuner="dora", config={"r": 2}).attach(backbone)
    assert all("base_layer" not in name for name in adapter.state())
    pointers = {value.data_ptr() for value in backbone.network.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in adapter.state().values()}


def test_what_peft_freezes_is_not_counted_as_trained() -> None:
    adapter = HF(tuner="mica", config={"r": 2}).attach(vit())
    assert all("lora_A" in name for name in adapter.named_trained())
    assert all(parameter.requires_grad for parameter in adapter.parameters())


# Where it acts


def test_a_slice_of_a_fused_tensor_is_refused_and_names_the_whole_one() -> None:
    with pytest.raises(AttachError, match=r"'blocks.0.attn.q' is a row slice .* select 'attn.qkv'"):
        HF(tuner="lora", sites="attn.q").attach(vit())


def test_a_role_takes_the_fused_tensor_whole() -> None:
    adapter = HF(tuner="lora", sites="attn", config={"r": 2}).attach(vit())
    assert {name.rpartition(".tuner")[0] for name in adapter.state()} == {
        "adapter.blocks.0.attn.qkv",
        "adapter.blocks.0.attn.proj",
    }


@pytest.mark.parametrize("tuner", ["dora", "oft", "vera"])
def test_attention_that_reads_its_weights_inside_a_function_is_adapted_in_the_weight(tuner: str) -> None:
    method = HF(tuner=tuner, sites={"roles": ["attn"], "stacks": "visual"}, config=TUNER_ARGUMENTS[tuner] | (
        {"oft_block_size": 4} if tuner == "oft" else {}))  # fmt: skip
    for contract in ("gradients_only_in_adapter", "merge_equals_unmerged", "save_load_round_trip"):
        CONTRACTS[contract](TinyCLIP, method)


def test_an_embedding_is_adapted_in_its_table() -> None:
    method = HF(tuner="lora", sites={"roles": ["embed"], "stacks": "text"}, config={"r": 2})
    for contract in ("gradients_only_in_adapter", "merge_equals_unmerged", "identity_at_init"):
        CONTRACTS[contract](TinyCLIP, method)


def test_dropout_is_refused_where_there_is_no_call() -> None:
    with pytest.raises(AttachError, match="cannot be dropped"):
        HF(tuner="lora", sites="attn", config={"lora_dropout": 0.1}).attach(TinyCLIP())


def test_another_bias_is_refused_where_only_the_weight_can_be_replaced() -> None:
    with pytest.raises(AttachError, match="changes the bias too"):
        HF(tuner="ia3", sites="attn").attach(TinyCLIP())


@pytest.mark.parametrize(
    ("tuner", "sites", "config"),
    [
        ("dora", "conv", {"r": 2}),
        ("loha", {"roles": ["conv"], "stacks": "unet.down"}, {"r": 2}),
        ("hra", {"roles": ["conv"], "stacks": "unet.mid"}, {"r": 2}),
        ("ia3", {"roles": ["conv"], "stacks": "unet.down"}, {}),
        ("boft", {"roles": ["conv"], "stacks": "unet.mid"}, {}),
    ],
)
def test_convolutions_merge_to_what_they_computed(tuner: str, sites: Any, config: dict[str, Any]) -> None:
    CONTRACTS["merge_equals_unmerged"](TinyUNet, HF(tuner=tuner, sites=sites, config=config))


def test_oft_is_refused_where_peft_adds_up_the_windows_of_a_convolution() -> None:
    with pytest.raises(AttachError, match="overlapping windows"):
        HF(tuner="oft", sites="conv", config={"oft_block_size": 4}).attach(TinyUNet())


def test_what_peft_cannot_do_is_said_in_one_sentence_and_leaves_nothing_behind() -> None:
    backbone = vit()
    with pytest.raises(AttachError, match="peft's 'c3a' cannot act on these sites: The block size should be") as caught:
        HF(tuner="c3a", config={"block_size": 256}).attach(backbone)
    assert "\n" not in str(caught.value)
    assert not backbone.adapters


# Together with others


def test_two_tuners_on_one_module_merge_to_what_they_computed() -> None:
    backbone = vit()
    for name, method in {"a": HF(tuner="dora", config={"r": 2}), "b": HF(tuner="oft", config={"oft_block_size": 8}),
                         "c": LoRA(rank=2)}.items():  # fmt: skip
        shift(method.attach(backbone, name=name), seed=len(name) + ord(name))
    unmerged = outputs(backbone)["tokens"]
    merge_(backbone)
    assert_close(outputs(backbone)["tokens"], unmerged, tolerance=1e-5)


def test_a_weighted_tuner_merges_to_what_it_computed() -> None:
    backbone = vit()
    adapter = HF(tuner="ia3").attach(backbone)
    shift(adapter)
    full = outputs(backbone)["tokens"]
    adapter.weight = 0.5
    half = outputs(backbone)["tokens"]
    assert float((half - full).abs().max()) > 1e-4
    merge_(backbone)
    assert_close(outputs(backbone)["tokens"], half, tolerance=1e-5)


def test_a_tuner_with_dropout_cannot_lie_below_another() -> None:
    backbone = vit()
    HF(tuner="lora", config={"r": 2, "lora_dropout": 0.1}).attach(backbone, name="a")
    with pytest.raises(AttachError, match="with dropout already, which cannot act below another one"):
        HF(tuner="lora", config={"r": 2}).attach(backbone, name="b")
    assert list(backbone.adapters) == ["a"]


def test_dropout_acts_while_training_only() -> None:
    backbone = vit()
    adapter = HF(tuner="lora", config={"r": 2, "lora_dropout": 0.5}).attach(backbone)
    shift(adapter, std=0.5)
    still = [outputs(backbone)["tokens"] for _ in range(2)]
    adapter.train()
    moving = [outputs(backbone)["tokens"] for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)
