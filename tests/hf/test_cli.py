"""The bridge through the command line: train with one of peft's tuners, export a LoRA folder, import one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_modal.api import load
from peft_modal.cli.main import main

TINY = [
    "--config", "pointcloud_idpt.yaml", "--backbone.weights=random", "--backbone.init=torch", "--backbone.dim=24",
    "--backbone.depth=2", "--backbone.num_heads=3", "--backbone.num_group=16", "--backbone.group_size=8",
    "--backbone.pointnet_dims=[8,16,16]", "--data.shots=2", "--data.val_per_class=1", "--data.test_per_class=1",
    "--data.num_points=64", "--data.pool_points=80", "--data.batch_size=16",
]  # fmt: skip
SHORT = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def outputs(path: str) -> torch.Tensor:
    model = load(path)
    return model(model.backbone.example_batch())


@pytest.mark.parametrize(
    "method",
    [
        ["--method=hf", "--method.tuner=dora", "--method.config.r=2"],
        ["--method=hf", "--method.tuner=corda", "--method.sites=mlp", "--method.config={r: 2}"],
    ],
    ids=["dora", "corda"],
)
def test_a_tuner_of_peft_is_trained_tested_and_merged(method: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TINY, *SHORT, *method, "--out", "run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text())
    assert figures["params/adapter"] > 0
    capsys.readouterr()
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deviation"]["weights"] < 1e-6
    before = load("run/adapter.safetensors").backbone.network.state_dict()
    merged = load_file("merged.safetensors")
    assert merged.keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in merged.items())


def test_lora_goes_to_peft_and_comes_back_to_the_same_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    method = ["--method=lora", "--method.rank=2", "--method.alpha=3"]
    assert main(["fit", *TINY, *SHORT, *method, "--out", "run"]) == 0
    assert main(["export", "--adapter", "run/adapter.safetensors", "--format", "peft", "--out", "folder"]) == 0
    assert {path.name for path in Path("folder").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "rest.safetensors", "README.md",
    }  # fmt: skip
    capsys.readouterr()
    assert main(["import", *TINY, "--input", "folder", "--out", "back.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"]["name"] == "lora"
    assert told["head_trained"]
    assert torch.allclose(outputs("back.safetensors"), outputs("run/adapter.safetensors"), rtol=1e-5, atol=1e-6)


def test_a_folder_without_a_head_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TINY, *SHORT, "--method=lora", "--method.rank=2", "--out", "run"]) == 0
    assert main(["export", "--adapter", "run/adapter.safetensors", "--out", "folder"]) == 0
    rest = Path("folder/rest.safetensors")
    assert any(name.startswith("head.") for name in load_file(rest))
    rest.unlink()
    capsys.readouterr()
    assert main(["import", *TINY, "--input", "folder", "--out", "back.safetensors"]) == 0
    assert "the folder has no head, so the head is untrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", *TINY, "--method=hf"], "method.tuner"),
        (["fit", *TINY, "--method=hf", "--method.tuner=lorra", "--out", "r"], "did you mean 'lora'"),
        (["fit", *TINY, "--method=hf", "--method.tuner=lora", "--method.config.rank=2", "--out", "r"],
         "method.config.rank: peft's 'lora' has no such key"),
        (["import", *TINY, "--input", "nowhere", "--out", "x.safetensors"], "adapter_config.json' does not exist"),
        (["import", *TINY, "--method=lora", "--input", "nowhere", "--out", "x.safetensors"],
         "the folder decides the method"),
        (["import", *TINY, "--input", "nowhere", "--out", "."], "'.' is a folder; name the adapter file"),
        (["export", "--adapter", "x.safetensors", "--format", "onxn", "--out", "y"], "--format"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
