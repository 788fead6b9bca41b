"""A whole run that trains a mixture of experts: what its file holds, and that an interrupted one goes on exactly."""

from pathlib import Path

import pytest
import torch
from tiny_runs import ARGUMENTS, InterruptInEpoch, measured, metrics_of, tensors_of, write_clouds

import peft_modal
from peft_modal.cli.main import main
from peft_modal.files import load_adapter
from peft_modal.running import fit as fitting

MOSA = [
    *(argument for argument in ARGUMENTS if not argument.startswith("--method")),
    "--method=mosa", "--method.hidden_dim=3", "--method.share=none", "--method.deep_consistency=0.5",
    "--trainer.accumulate_grad_batches=2",
]  # fmt: skip
ONE = 2 * 24 + 2 * 3 * 24 + 3 + 24
"""Entries of one block's adapter: norm, D and U with biases."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosa")
    write_clouds(folder / "good", {"a": 8, "b": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PEFT_MODAL_CACHE", str(folder / "cache"))
        assert main(["fit", *MOSA, "--out", "run"]) == 0
        yield folder / "run"


def test_the_file_holds_one_adapter_and_the_figures_count_all_experts(run):
    tensors, _ = load_adapter(run / "adapter.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("adapter.")}
    assert {name.rpartition(".")[2] for name in own} == {"weight", "bias"}
    assert sum(tensor.numel() for tensor in own.values()) == 2 * ONE
    assert metrics_of(run)["params/adapter"] == 2 * ONE
    assert metrics_of(run)["params/training_only"] == 2 * 3 * (ONE - 2 * 24)
    # U started at zero: what the file holds was trained.
    assert all(bool(tensor.any()) for name, tensor in own.items() if name.endswith("up.weight"))


def test_a_checkpoint_holds_all_experts_and_who_owns_what(run):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 — our own file
    ups = [tensor for name, tensor in state.items() if ".up.weight_" in name]
    assert len(ups) == 2 * 4
    assert len([name for name in state if name.endswith("owner")]) == 2 * 2


def test_the_divergence_of_the_passes_is_logged(run):
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert "train/consistency" in header
    assert "train/deep_consistency" in header


def test_a_loaded_file_has_no_experts_and_repeats_itself(run):
    model = peft_modal.load(run / "adapter.safetensors")
    assert sum(p.numel() for p in model.adapter.adapter.parameters()) == 2 * ONE
    batch = model.backbone.example_batch()
    assert torch.equal(model(batch), model(batch))


def test_an_interrupted_run_that_goes_on_gives_what_an_uninterrupted_one_gives(run, monkeypatch):
    make = fitting.make_trainer

    def interrupted(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.callbacks.insert(0, InterruptInEpoch())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "make_trainer", interrupted)
        assert main(["fit", *MOSA, "--out", "stopped"]) == 130
    assert not Path("stopped/metrics.json").exists()
    assert main(["fit", *MOSA, "--out", "stopped"]) == 0
    assert measured("stopped") == measured(run)
    assert tensors_of("stopped") == tensors_of(run)


def test_a_task_without_class_logits_is_refused_before_it_trains(run, capsys):
    pretraining = [
        *(argument for argument in MOSA if not argument.startswith(("--head", "--task"))),
        "--task=masked_autoencoding", "--head=masked_decoder", "--head.num_heads=3", "--head.group_size=4",
    ]  # fmt: skip
    del run
    assert main(["fit", *pretraining, "--out", "refused"]) == 2
    assert "method.consistency: this task has no class logits" in capsys.readouterr().err
