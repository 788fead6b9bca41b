"""Whole runs through the command line, as small as they get."""

import json
from pathlib import Path

import pytest
import torch

import peft_modal
from peft_modal.cli.main import main
from peft_modal.files import read_tensors
from peft_modal_clip.backbone import OpenCLIPBackbone

FIT = [
    "fit", "--config", "clip_pretrain_nano.yaml", "--backbone.vision_layers=1", "--backbone.text_layers=1",
    "--backbone.vision_width=32", "--backbone.text_width=32", "--backbone.embed_dim=16", "--data.batches=6",
    "--data.batch_size=16", "--data.val_per_pair=1", "--data.test_per_pair=1", "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def test_pretraining_measures_seen_and_held_out_pairs_and_merges_into_weights():
    assert main([*FIT, "--out", "run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text())
    for part in ("val", "test"):
        assert {f"{part}/loss", f"{part}/accuracy_seen", f"{part}/accuracy_held_out"} <= set(figures)
    assert figures["params/backbone_trained"] == figures["params/total"]

    assert main(["merge", "--adapter", "run/adapter.safetensors", "--dtype", "float16", "--out", "w.safetensors"]) == 0
    sizes = read_tensors(Path("w.safetensors"))[1]["backbone"]
    backbone = OpenCLIPBackbone(**{key: value for key, value in sizes.items() if key != "name"})
    backbone.load_weights()
    batch = backbone.example_batch()
    trained = peft_modal.load("run/adapter.safetensors").backbone
    with torch.no_grad():
        assert torch.allclose(backbone(batch).tokens, trained(batch).tokens, atol=0.02)
    assert backbone.tokenizer == "nano"
