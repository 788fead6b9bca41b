"""The backbone and the method, by the checks that peft_modal offers to plugin authors."""

import pytest
import torch

from peft_modal.anatomy import Context
from peft_modal.errors import AttachError, ConfigError, DataError, WeightsError
from peft_modal.files import write_tensors
from peft_modal.methods.vpt import VPT
from peft_modal.registry import default_registry
from peft_modal.testing import CONTRACTS, assert_anatomy, check_compile, example_methods
from peft_modal_timeseries.backbone import PatchTransformerBackbone
from peft_modal_timeseries.conv_adapter import ConvAdapter
from peft_modal_timeseries.heads import AttentivePooling

REGISTRY = default_registry()
METHODS = sorted(entry.name for entry in REGISTRY.entries("method") if entry.modality in {"", "timeseries"})
REFUSED = {"convpass": "none of its blocks works on a grid of patches"}
"""Methods that cannot work on a series, with what they say."""
QUICK = [name for name in CONTRACTS if name != "compile"]


def test_the_plugin_is_installed():
    assert {"conv_adapter", "lora", "full"} <= set(METHODS), "run: pip install ./examples/peft_modal_timeseries"


def test_the_anatomy_describes_the_network():
    assert_anatomy(PatchTransformerBackbone.tiny())


@pytest.mark.parametrize("contract", QUICK)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_every_contract(name, contract):
    methods = example_methods(REGISTRY, modality="timeseries")
    if name not in methods:
        pytest.skip("its optional packages are not installed")
    if name in REFUSED:
        with pytest.raises(AttachError, match=REFUSED[name]):
            methods[name].attach(PatchTransformerBackbone.tiny())
        return
    CONTRACTS[contract](PatchTransformerBackbone.tiny, methods[name])


def test_the_conv_adapter_compiles():
    check_compile(PatchTransformerBackbone.tiny, ConvAdapter())


def test_the_shipped_weights_fit_the_default_network():
    backbone = PatchTransformerBackbone()
    backbone.load_weights()
    assert not torch.equal(backbone.network.cls_token, PatchTransformerBackbone(weights="random").network.cls_token)


def test_weights_come_back_from_a_file(tmp_path):
    one = PatchTransformerBackbone(weights="random", init_seed=1)
    write_tensors(tmp_path / "own.safetensors", one.network.state_dict(), {})
    other = PatchTransformerBackbone(weights=str(tmp_path / "own.safetensors"), init_seed=2)
    other.load_weights()
    state = one.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.network.state_dict().items())


def test_weights_of_another_size_are_refused_and_change_nothing(tmp_path):
    write_tensors(tmp_path / "small.safetensors", PatchTransformerBackbone.tiny().network.state_dict(), {})
    backbone = PatchTransformerBackbone(weights=str(tmp_path / "small.safetensors"))
    before = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"of another architecture: it has no 'blocks\.3\.norm1\.weight'.*more"):
        backbone.load_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.network.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 2, 3), "3 steps do not fit a backbone that takes 4 to 35"),
        ((2, 2, 36), "36 steps do not fit"),
        ((2, 3, 16), "3 channels, the backbone takes 2"),
        ((2, 16), r"shape \(batch, channels, steps\), got \(2, 16\)"),
    ],
)
def test_series_that_do_not_fit_are_refused(shape, sentence):
    with pytest.raises(DataError, match=sentence):
        PatchTransformerBackbone.tiny()({"series": torch.zeros(shape)})


def test_channels_see_each_other():
    backbone = PatchTransformerBackbone.tiny()
    batch = backbone.example_batch()
    changed = {"series": batch["series"].clone()}
    changed["series"][:, 1] += 1.0
    first = slice(1, 1 + 4)  # patches of channel 0
    assert not torch.allclose(backbone(batch).tokens[:, first], backbone(changed).tokens[:, first])


def branch_of(backbone):
    adapter = ConvAdapter(hidden_dim=4, dropout=0.0, blocks=[0]).attach(backbone, name="conv")
    (module,) = (m for m in adapter.modules() if hasattr(m, "conv"))
    torch.nn.init.normal_(module.up.weight)
    return module


def context_of(backbone, num_channels):
    context = Context({}, backbone.contexts.inserted)
    context.put("num_channels", num_channels)
    return context


@torch.no_grad()
def test_the_convolution_is_a_sum_over_neighbouring_patches_of_one_channel():
    backbone = PatchTransformerBackbone.tiny()
    module = branch_of(backbone)
    x = torch.randn(2, 1 + 2 * 5, 24)

    found = module(x, context_of(backbone, 2))

    hidden = module.down(x)
    by_hand = hidden.clone()
    for channel in range(2):
        for n in range(5):
            total = module.conv.bias.clone()
            for offset in (-1, 0, 1):
                if 0 <= n + offset < 5:
                    total = total + module.conv.weight[:, 0, offset + 1] * hidden[:, 1 + 5 * channel + n + offset]
            by_hand[:, 1 + 5 * channel + n] += total
    expected = module.up(torch.nn.functional.gelu(by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", ["prefix", "end"])
def test_prompts_of_another_adapter_are_not_convolved(place):
    backbone = PatchTransformerBackbone.tiny()
    module = branch_of(backbone)
    x = torch.randn(2, 1 + 2 * 5, 24)
    prompts = torch.randn(2, 3, 24)
    at = 1 if place == "prefix" else x.shape[1]
    expected = module(x, context_of(backbone, 2))

    VPT(num_tokens=3, place=place).attach(backbone, name="vpt")
    found = module(torch.cat([x[:, :at], prompts, x[:, at:]], 1), context_of(backbone, 2))

    torch.testing.assert_close(torch.cat([found[:, :at], found[:, at + 3 :]], 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"hidden_dim": 0}, {"kernel_size": 4}, {"dropout": 1.0}])
def test_arguments_out_of_range_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=f"method.{name}"):
        ConvAdapter(**arguments)


def test_tokens_that_are_no_sequence_are_refused():
    from dataclasses import replace

    backbone = PatchTransformerBackbone.tiny()
    backbone.anatomy.layouts["blocks"] = replace(backbone.anatomy.layouts["blocks"], body="grid")
    with pytest.raises(AttachError, match="holds grid; a convolution along time needs a sequence"):
        ConvAdapter().attach(backbone)


@torch.no_grad()
def test_the_head_weighs_patches_by_their_product_with_the_query():
    backbone = PatchTransformerBackbone.tiny()
    features = backbone(backbone.example_batch())
    head = AttentivePooling(backbone.feature_spec(), 5, num_queries=1, dropout=0.0)

    patches = features.tokens[:, 1:]
    weights = ((patches @ head.query.weight[0]) / 24**0.5).softmax(1)
    pooled = (weights[..., None] * patches).sum(1)
    expected = head.linear(torch.cat([features.tokens[:, 0], pooled], 1))

    torch.testing.assert_close(head(features), expected)
