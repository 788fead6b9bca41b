"""Merged weights give what the adapter gave, and start other runs."""

import json
from pathlib import Path

import pytest
import torch
from point_cloud_runs import IDPT, TINY_BACKBONE, TINY_DATA
from safetensors import safe_open

import peft_modal
from peft_modal.cli.main import main
from peft_modal.errors import WeightsError


@pytest.mark.parametrize("method", ["lora", "ssf", "bitfit", "full"])
def test_merged_weights_give_the_adapters_features_within_the_printed_deviation(method, capsys):
    assert main(["fit", *IDPT[:-1], f"--method={method}", "--trainer.max_epochs=1", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    from peft_modal_pointcloud.backbone import PointMAEBackbone

    model = peft_modal.load("run/adapter.safetensors")
    arguments = {key: value for key, value in printed["backbone"].items() if key != "name"}
    merged = PointMAEBackbone(**arguments)
    merged.load_weights()
    batch = merged.example_batch(8)
    with torch.no_grad():
        adapted, plain = model.backbone(batch).tokens.double(), merged(batch).tokens.double()
    off = float((adapted - plain).abs().max())
    assert off == pytest.approx(printed["deviation"]["features"], rel=1e-6)
    assert printed["deviation"]["features_relative"] == pytest.approx(off / float(adapted.abs().max()), rel=1e-6)
    assert off < 2e-5
    assert 0 <= printed["deviation"]["weights"] < 1e-6


def test_a_merged_adapter_goes_on_predicting_with_its_head(capsys):
    assert main(["fit", *IDPT[:-1], "--method=lora", "--out", "run"]) == 0
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "predict --adapter merged.head.safetensors" in shown
    assert "--backbone.weights=merged.safetensors --backbone.dim=24" in shown

    adapted, merged = (peft_modal.load(f) for f in ("run/adapter.safetensors", "merged.head.safetensors"))
    assert merged.class_names == adapted.class_names
    assert merged.header.preprocessing == adapted.header.preprocessing
    assert not merged.adapter.counts()["adapter"]
    batch = merged.backbone.example_batch(4)
    torch.testing.assert_close(merged(batch), adapted(batch), atol=1e-5, rtol=1e-5)

    Path("merged.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"merged\.safetensors"):
        peft_modal.load("merged.head.safetensors")


def test_the_deviation_tells_of_the_cast(capsys):
    assert main(["fit", *IDPT[:-1], "--method=lora", "--trainer.max_epochs=1", "--out", "run"]) == 0
    capsys.readouterr()
    deviation = {}
    for dtype in ("float32", "bfloat16"):
        out = f"{dtype}.safetensors"
        assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", out, "--dtype", dtype, "--json"]) == 0
        deviation[dtype] = json.loads(capsys.readouterr().out)["deviation"]
    for key in ("weights", "features", "features_relative"):
        assert deviation["bfloat16"][key] > 100 * deviation["float32"][key]
    with safe_open("bfloat16.safetensors", framework="pt") as file:
        assert file.get_slice("norm.weight").get_dtype() == "BF16"
    assert peft_modal.load("bfloat16.head.safetensors").class_names


def test_what_cannot_merge_says_why_and_what_to_do(capsys):
    assert main(["fit", *IDPT, "--trainer.max_epochs=1", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: method 'idpt' cannot be merged: a set of prompts in 1 block has no equivalent")
    assert "Use the adapter file as it is" in sentence
    assert sentence.count("\n") == 1
    assert not Path("merged.safetensors").exists()


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("merged.pt", "'merged.pt' does not end in .safetensors"),
     ("run/adapter.safetensors", "would overwrite the adapter file itself")],
)  # fmt: skip
def test_a_merge_into_the_wrong_file_is_refused(run, out, sentence, capsys):
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", out]) == 2
    assert sentence in capsys.readouterr().err


def test_merged_weights_start_another_run():
    whole = ["--backbone.train_cls=false", "--trainer.max_epochs=1"]
    probe = ["--config", "pointcloud_linear_probe.yaml", *TINY_BACKBONE, *TINY_DATA, *whole]

    assert main(["fit", *IDPT[:-1], *whole, "--method=full", "--out", "run"]) == 0
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 0
    assert main(["fit", *probe, "--backbone.weights=merged.safetensors", "--out", "probe"]) == 0

    full, probed = (peft_modal.load(f"{name}/adapter.safetensors").backbone for name in ("run", "probe"))
    assert full.network.state_dict().keys() == probed.network.state_dict().keys()
    batch = full.example_batch()
    with torch.no_grad():
        assert torch.equal(full(batch).tokens, probed(batch).tokens)
