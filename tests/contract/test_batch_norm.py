"""Contracts on a network with BatchNorm, whose statistics stand still or drift as the frozen mode says."""

from __future__ import annotations

import pytest
import torch
from contract.batch_norm import BatchNormBackbone
from contract.cases import Configuration

from peft_modal.anatomy import FrozenMode
from peft_modal.testing import assert_anatomy, run_contract

CONFIGURATIONS = {
    "full": Configuration("full"),
    "linear_probe": Configuration("linear_probe"),
    "bitfit": Configuration("bitfit"),
    "norm_tuning": Configuration("norm_tuning"),
    "lora": Configuration("lora", {"sites": ["conv", "proj"], "rank": 2}),
    "ssf": Configuration("ssf"),
}


@pytest.mark.parametrize("frozen_mode", ["eval", "reference"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_contracts_hold(name: str, frozen_mode: FrozenMode) -> None:
    results = run_contract(
        lambda: BatchNormBackbone(frozen_mode=frozen_mode), CONFIGURATIONS[name].method(), leave_out=["compile"]
    )
    # BatchNormBackbone offers no gradient checkpointing.
    assert results.pop("gradient_checkpointing") == "skipped: BatchNormBackbone has no gradient checkpointing"
    assert set(results.values()) == {"ok"}, results


@pytest.mark.parametrize("frozen_mode", ["eval", "reference"])
def test_anatomy_describes_the_network(frozen_mode: FrozenMode) -> None:
    assert_anatomy(BatchNormBackbone(frozen_mode=frozen_mode))


@pytest.mark.parametrize("frozen_mode", ["eval", "reference"])
def test_statistics_drift_in_the_adapter_only_and_only_where_the_mode_says_so(frozen_mode: FrozenMode) -> None:
    backbone = BatchNormBackbone(frozen_mode=frozen_mode)
    adapter = CONFIGURATIONS["lora"].method().attach(backbone)
    before = backbone.tensor("1.running_mean").clone()

    backbone.train()
    backbone(backbone.example_batch())

    assert torch.equal(backbone.tensor("1.running_mean"), before)
    moved = adapter.state().get("backbone.1.running_mean", before)
    assert torch.equal(moved, before) == (frozen_mode == "eval")
