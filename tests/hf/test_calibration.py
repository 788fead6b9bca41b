"""CorDA and EVA look at the inputs of their sites, and compute what peft computes from them."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import assert_close, draw, randomise
from plain_backbone import PlainBackbone
from tiny_backbones import TinyCLIP
from torch import nn

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.errors import AttachError
from peft_modal.methods.hf import HF
from peft_modal.testing import CONTRACTS
from peft_modal.testing.sandbox import outputs


def backbone() -> PlainBackbone:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    randomise(net, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        b.op("first", "0")
        b.op("second", "2")

    return PlainBackbone(net, describe, example=(40, 6))


def batches() -> list[dict[str, torch.Tensor]]:
    # One sample a batch, as peft's own hooks need it.
    spread = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.5, 0.5])
    return [{"x": draw(1, 40, 6, seed=seed, dtype=torch.float32) * spread} for seed in (1, 2, 3)]


@pytest.mark.parametrize("how", ["kpm", "ipm"])
def test_corda_gives_the_factors_and_the_residual_of_peft(how: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    ours = backbone()
    network = copy.deepcopy(ours.network)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=how),
    )  # fmt: skip
    preprocess_corda(network, config, run_model=lambda: [network(batch["x"]) for batch in batches()])
    theirs = inject_adapter_in_model(config, network)
    method = HF(
        tuner="corda", sites=["first", "second"],
        config={"r": 2, "lora_alpha": 6, "corda_config": {"corda_method": how}},
    )  # fmt: skip
    adapter = method.attach(ours)
    before = outputs(ours)["tokens"]

    adapter.events.prepare(batches(), lambda batch: {"loss": ours(batch).tokens.sum()})

    for path in ("0", "2"):
        operation, layer = adapter.adapter.get_submodule(path), theirs.get_submodule(path)
        assert_close(operation.tuner.lora_A["default"].weight, layer.lora_A["default"].weight, tolerance=1e-4)
        assert_close(operation.tuner.lora_B["default"].weight, layer.lora_B["default"].weight, tolerance=1e-4)
        residual = ours.tensor(f"{path}.weight") - operation.start.delta()
        assert_close(residual, layer.get_base_layer().weight.detach(), tolerance=1e-4)
    assert_close(outputs(ours)["tokens"], before, tolerance=1e-5)


def test_eva_gives_the_principal_components_of_the_inputs() -> None:
    ours = backbone()
    adapter = HF(tuner="eva", sites=["first"], config={"r": 2}).attach(ours)
    adapter.events.prepare(batches(), lambda batch: {"loss": ours(batch).tokens.sum()})
    rows = torch.cat([batch["x"].reshape(-1, 6) for batch in batches()])
    _, _, components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = adapter.adapter.get_submodule("0").tuner.lora_A["default"].weight
    cosine = (found @ components[:2].T).abs().diagonal()
    assert torch.allclose(cosine, torch.ones(2), atol=1e-2)  # peft's decomposition is a randomised one


@pytest.mark.parametrize("tuner", ["corda", "eva"])
def test_calibrated_adapters_are_saved_and_merged(tuner: str) -> None:
    method = HF(tuner=tuner, sites=["first", "second"], config={"r": 2})
    for contract in ("gradients_only_in_adapter", "save_load_round_trip", "merge_equals_unmerged", "copy_and_pickle"):
        CONTRACTS[contract](backbone, method)


def test_a_calibrated_adapter_is_restored_from_its_file_without_data() -> None:
    ours, reader = backbone(), backbone()
    method = HF(tuner="corda", sites=["first"], config={"r": 2})
    adapter = method.attach(ours)
    adapter.events.prepare(batches(), lambda batch: {"loss": ours(batch).tokens.sum()})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    fresh = method.attach(reader, generator=torch.Generator().manual_seed(3))
    fresh.load(adapter.state())
    assert torch.equal(outputs(reader)["tokens"], outputs(ours)["tokens"])


def test_no_data_is_an_error() -> None:
    ours = backbone()
    adapter = HF(tuner="corda", sites=["first"], config={"r": 2}).attach(ours)
    with pytest.raises(AttachError, match="needs calibration data"):
        adapter.events.prepare([], lambda batch: {})


def test_a_site_without_a_call_is_refused() -> None:
    with pytest.raises(AttachError, match="cannot see its inputs"):
        HF(tuner="corda", sites="attn", config={"r": 2}).attach(TinyCLIP())
