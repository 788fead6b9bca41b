"""Our LoRA computes what peft's LoRA computes, with the same factors: outputs, gradients, merged weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from numeric import assert_close, gradients, projection_loss, randomise
from plain_backbone import PlainBackbone
from torch import nn

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.attach import merge_
from peft_modal.methods.lora import LoRA

NETWORKS = {
    "linear": (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)), (5, 6)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 3, 1)), (4, 7)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 6, (3, 2), stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)), (3, 6, 6)),
    # Not 1x1x1: peft's own merge of such a kernel fails.
    "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 2), nn.Tanh(), nn.Conv3d(4, 3, 2)), (2, 4, 4, 4)),
}


@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_gradients_and_merged_weights_are_equal(network: str, rank_stabilised: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    module, example = NETWORKS[network]
    module = copy.deepcopy(module).double()
    randomise(module, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        b.op("first", "0")
        b.op("second", "2")

    config = LoraConfig(r=3, lora_alpha=5, use_rslora=rank_stabilised, target_modules=["0", "2"])
    theirs = inject_adapter_in_model(config, copy.deepcopy(module))
    backbone = PlainBackbone(module, describe, example=example)
    method = LoRA(sites=["first", "second"], rank=3, alpha=5, rank_stabilised=rank_stabilised)
    adapter = method.attach(backbone).double()
    randomise(adapter, seed=7)
    own, their = [], []
    for path in ("0", "2"):
        update, layer = adapter.adapter.get_submodule(path), theirs.get_submodule(path)
        own += [update.down, update.up]
        their += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        for target, value in zip(their, own, strict=True):
            target.copy_(value)
    x = backbone.example_batch()["x"].requires_grad_()

    actual, expected = backbone({"x": x}).tokens, theirs(x)

    assert_close(actual, expected, tolerance=1e-12)
    for got, wanted in zip(
        gradients(projection_loss(actual), [x, *own]), gradients(projection_loss(expected), [x, *their]), strict=True
    ):
        assert_close(got, wanted, tolerance=1e-12)
    assert method.scale == pytest.approx(5 / (math.sqrt(3) if rank_stabilised else 3))
    merge_(backbone)
    for path in ("0", "2"):
        layer = theirs.get_submodule(path)
        layer.merge()
        assert_close(backbone.tensor(f"{path}.weight"), layer.get_base_layer().weight, tolerance=1e-12)
