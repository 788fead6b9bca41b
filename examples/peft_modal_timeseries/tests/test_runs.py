"""Whole runs through the command line, found by name as the plugin registers them."""

import json

import pytest
from matplotlib.figure import Figure

from peft_modal.cli.main import main
from peft_modal_timeseries.backbone import PatchTransformerBackbone
from peft_modal_timeseries.rendering import render

SMALL = ["--data.shots=4", "--data.val_per_class=2", "--data.test_per_class=2", "--data.batch_size=8"]
TINY = ["--backbone.weights=random", "--backbone.dim=24", "--backbone.depth=1"]


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", ["timeseries_conv_adapter.yaml", "timeseries_pretrain_nano.yaml"])
def test_every_shipped_configuration_runs(config):
    assert main(["fit", "--config", config, *SMALL, "--trainer.fast_dev_run=true"]) == 0


def test_a_run_can_be_tested_predicted_with_and_merged(tmp_path, capsys):
    short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    assert main(["fit", "--config", "timeseries_conv_adapter.yaml", *SMALL, *TINY, *short, "--out", "run"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["params/adapter"] > 0

    adapter = ["--adapter", "run/adapter.safetensors"]
    assert main(["test", *adapter]) == 0
    (tmp_path / "one.csv").write_text("left,right\n" + "\n".join(f"{i},{-i}" for i in range(40)) + "\n")
    assert main(["predict", *adapter, "--input", "one.csv", "--out", "predictions"]) == 0
    (row,) = json.loads((tmp_path / "predictions/predictions.json").read_text())
    assert row["path"] == "one.csv"
    assert len(row["probabilities"]) == 8

    capsys.readouterr()
    assert main(["merge", *adapter, "--out", "merged.safetensors"]) == 2
    assert "has no equivalent in plain weights" in capsys.readouterr().err


def test_a_core_method_runs_and_merges_into_weights_that_load(tmp_path):
    short = ["--trainer.max_epochs=1", "--method=lora", "--method.rank=2"]
    assert main(["fit", "--config", "timeseries_conv_adapter.yaml", *SMALL, *TINY, *short, "--out", "run"]) == 0
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 0
    merged = PatchTransformerBackbone(weights=str(tmp_path / "merged.safetensors"), dim=24, depth=1)
    merged.load_weights()


def test_a_wrong_method_argument_is_one_sentence(capsys):
    code = main(["fit", "--config", "timeseries_conv_adapter.yaml", "--method.kernel_size=4"])
    assert code == 2
    assert "method.kernel_size: 4 is no odd number" in capsys.readouterr().err


def test_the_renderer_draws_every_channel():
    axes = Figure().add_subplot()
    render(axes, {"series": PatchTransformerBackbone.tiny().example_batch()["series"][0]}, None)
    assert len(axes.lines) == 2
