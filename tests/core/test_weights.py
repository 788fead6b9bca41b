"""Backbone weights out of files: all or nothing, and why not."""

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_modal.errors import FileFormatError, WeightsError
from peft_modal.files import write_tensors
from peft_modal.weights import load_network


def network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


def test_a_half_precision_file_fills_a_network_and_leaves_its_type(tmp_path: Path) -> None:
    one, other = network(), network()
    write_tensors(tmp_path / "w.safetensors", {name: t.half() for name, t in one.state_dict().items()}, {})
    load_network(other, tmp_path / "w.safetensors")
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[0].weight, one[0].weight.half().float())


def test_every_kind_of_misfit_is_told_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = {
        "0.weight": torch.zeros(4, 2),
        "0.bias": torch.zeros(3),
        "1.weight": torch.zeros(1, 3),
        "x": torch.zeros(1),
    }
    write_tensors(tmp_path / "w.safetensors", state, {})
    target = network()
    before = target[0].bias.clone()
    with pytest.raises(
        WeightsError, match=r"it has no '1\.bias', an unknown 'x', '0\.weight' of shape \(4, 2\) instead of \(3, 2\)$"
    ):
        load_network(target, tmp_path / "w.safetensors")
    assert torch.equal(target[0].bias, before)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"'nano2' is neither a name that this backbone knows nor an existing file"):
        load_network(network(), "nano2")


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"none")
    with pytest.raises(FileFormatError, match="no readable safetensors file"):
        load_network(network(), tmp_path / "w.safetensors")
