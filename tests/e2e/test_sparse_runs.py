"""A whole run that trains chosen entries: what its file holds, and what loading makes of it."""

from pathlib import Path

import pytest
import torch
from tiny_runs import ARGUMENTS, metrics_of, write_clouds

import peft_modal
from peft_modal.cli.main import main
from peft_modal.errors import AttachError, BackboneMismatchError
from peft_modal.files import load_adapter, save_adapter

SARA = [
    *(argument for argument in ARGUMENTS if not argument.startswith("--method")),
    "--method=sara", "--method.share=0.2", "--task.keep=best",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sara")
    write_clouds(folder / "good", {"a": 8, "b": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PEFT_MODAL_CACHE", str(folder / "cache"))
        assert main(["fit", *SARA, "--out", "run"]) == 0
    return folder / "run"


def test_the_file_holds_positions_and_changes_of_all_entries_ever_trained(run):
    tensors, header = load_adapter(run / "adapter.safetensors")
    entries = [name for name in tensors if name.startswith("adapter.")]
    assert {name.rpartition(".")[2] for name in entries} == {"index", "delta"}
    # The class token and its position are always trained on this backbone, and so left alone.
    assert not [name for name in entries if "cls" in name]
    count = sum(tensors[name].numel() for name in entries if name.endswith(".delta"))
    assert count == metrics_of(run)["params/adapter"]
    model = peft_modal.load(run / "adapter.safetensors")
    taken = sum(p.numel() for name, p in model.backbone.network.named_parameters() if not name.startswith("cls"))
    assert count == round(0.2 * taken)
    assert header.facts["sara"]["format"] == "sara-v1"
    assert header.facts["sara"]["alpha"] == 1.0


def test_loading_takes_a_weight_where_everything_that_is_trained_has_one(run):
    path = run / "adapter.safetensors"
    assert peft_modal.load(path, weight=1.0).adapter.weight == 1.0
    with pytest.raises(AttachError, match="a trained 'cls_token' cannot be weighted"):
        peft_modal.load(path, weight=0.5)


def test_a_file_whose_entries_are_of_another_base_is_refused(run, tmp_path):
    tensors, header = load_adapter(run / "adapter.safetensors")
    header.facts["sara"]["base_sha256"] = "0" * 64
    save_adapter(tmp_path / "other.safetensors", tensors, header)
    with pytest.raises(BackboneMismatchError, match="base_sha256 000000000000 in the file"):
        peft_modal.load(tmp_path / "other.safetensors")


def test_inspecting_the_file_shows_its_facts(run, capsys):
    assert main(["inspect", "--adapter", str(run / "adapter.safetensors")]) == 0
    assert "format=sara-v1, threshold=" in capsys.readouterr().out


def test_merged_weights_compute_what_the_file_computes(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert main(["merge", "--adapter", str(run / "adapter.safetensors"), "--out", "merged.safetensors"]) == 0
    capsys.readouterr()
    adapted, merged = (peft_modal.load(f) for f in ("run/adapter.safetensors", "merged.head.safetensors"))
    batch = adapted.backbone.example_batch()
    torch.testing.assert_close(merged(batch), adapted(batch), rtol=0, atol=1e-6)
    assert Path("merged.safetensors").is_file()
