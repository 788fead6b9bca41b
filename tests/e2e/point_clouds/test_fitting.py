"""What `fit` leaves: an adapter, its configuration, figures and a report."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from point_cloud_runs import IDPT, PRETRAIN, SHORT, TINY_BACKBONE, TINY_DATA
from safetensors import safe_open
from tiny_runs import measured, metrics_of

import peft_modal
from peft_modal.cli.main import main
from peft_modal.errors import ConfigError
from peft_modal.running.fit import prepare


def test_fit_leaves_an_adapter_its_configuration_and_its_figures(run):
    figures = metrics_of(run)

    assert {"test/accuracy", "test/mean_class_accuracy", "val/accuracy", "params/adapter", "params/backbone_trained",
            "params/head", "params/total", "time/step_ms", "memory/peak_mb"} <= set(figures)  # fmt: skip
    assert figures["params/adapter"] == 9 * 24**2 + 8 * 24
    assert figures["params/backbone_trained"] == 2 * 24
    for name in ("adapter.safetensors", "config.yaml", "metrics.csv", "checkpoints/last.ckpt"):
        assert (run / name).is_file()


def test_fit_leaves_a_report_with_curves_samples_classes_and_parameters(run):
    twin = json.loads((run / "report.json").read_text())
    page = (run / "report.html").read_text()

    assert list(twin["sections"]) == [
        "curves", "samples", "classes", "sight", "parameters", "cost", "environment", "reproduce",
    ]  # fmt: skip
    assert twin["metrics"] == metrics_of(run)
    assert twin["problems"] == []
    loss, *_ = twin["sections"]["curves"]["blocks"][0]["blocks"]
    assert {name: len(points) for name, points in loss["data"]["series"].items()} == {"training": 3, "validation": 3}
    drawn = [*twin["sections"]["samples"]["blocks"], *twin["sections"]["sight"]["blocks"]]
    tiles = [tile for gallery in drawn for tile in gallery["tiles"]]
    assert page.count("data:image/png;base64,") == len(tiles) > 0
    (summary, *_) = twin["sections"]["parameters"]["blocks"]
    figures = metrics_of(run)
    assert [(row[0], row[2]) for row in summary["rows"]] == [
        ("Adapter", figures["params/adapter"]),
        ("Backbone tensors", figures["params/backbone_trained"]),
        ("Head", figures["params/head"]),
    ]


def test_the_command_in_the_report_repeats_the_run(run):
    command = json.loads((run / "report.json").read_text())["sections"]["reproduce"]["blocks"][0]["text"]
    program, *arguments = command.split(" peft_modal ")

    assert program == "python -m"
    assert main(arguments[0].split()) == 0
    assert measured("run-again") == measured(run)


def test_a_report_that_fails_costs_nothing_else(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("out of ink")

    monkeypatch.setattr("peft_modal.running.report.write_report", broken)

    assert main(["fit", *IDPT, "--out", "run"]) == 0
    assert "warning: there is no report: RuntimeError: out of ink" in capsys.readouterr().err
    assert "test/accuracy" in metrics_of("run")
    assert not Path("run/report.html").exists()


def test_the_written_configuration_repeats_the_run(run):
    assert main(["fit", "--config", "run/config.yaml", "--out", "again"]) == 0
    assert measured("again") == measured(run)


def test_a_finished_run_is_not_overwritten_unless_asked(run, capsys):
    before = (run / "adapter.safetensors").read_bytes()

    assert main(["fit", *IDPT, "--out", "run"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run / "adapter.safetensors").read_bytes() == before
    assert main(["fit", *IDPT, "--out", "run", "--overwrite"]) == 0


def test_statistics_that_drift_are_in_the_file():
    assert main(["fit", *IDPT, "--backbone.frozen_mode=reference", "--out", "run"]) == 0
    model = peft_modal.load("run/adapter.safetensors")

    mean = model.adapter.state()["backbone.encoder.first_conv.1.running_mean"]
    assert not torch.equal(mean, model.backbone.tensor("encoder.first_conv.1.running_mean"))


def test_half_precision_trains():
    assert main(["fit", *IDPT, "--trainer.precision=bf16-mixed", "--out", "run"]) == 0


def test_masked_pre_training_runs():
    assert main(["fit", *PRETRAIN, "--out", "run"]) == 0
    assert "test/loss" in metrics_of("run")
    # A task without classes has a report without them.
    twin = json.loads(Path("run/report.json").read_text())

    assert list(twin["sections"]) == ["curves", "sight", "parameters", "cost", "environment", "reproduce"]
    assert twin["facts"][0]["label"] == "Test loss"


def test_block_masks_pre_train_from_the_first_pass_on():
    sizes = ["--data.per_family=2", "--data.num_points=128", "--data.pool_points=128", "--data.batch_size=16"]
    arguments = [*TINY_BACKBONE, *sizes, "--head.num_heads=3", "--head.group_size=8", "--trainer.max_epochs=1"]

    code = main(["fit", "--config", "pointcloud_pretrain_nano.yaml", *arguments, "--task.mask=block", "--out", "run"])

    assert code == 0
    assert "test/loss" in metrics_of("run")


def test_point_peft_stores_its_bank_of_all_training_clouds_and_is_measured_from_the_file():
    arguments = [*TINY_BACKBONE, *TINY_DATA, *SHORT, "--method.k=4"]
    assert main(["fit", "--config", "pointcloud_point_peft.yaml", *arguments, "--out", "run"]) == 0
    with safe_open("run/adapter.safetensors", "pt") as file:
        (name,) = [name for name in file.keys() if name.endswith("prompts.bank")]  # noqa: SIM118 - no mapping
        bank = file.get_tensor(name)

    assert bank.shape == (24, 12 * 4)
    assert torch.allclose(bank.norm(dim=0), torch.ones(48), atol=1e-5)
    assert main(["test", "--adapter", "run/adapter.safetensors", "--out", "again"]) == 0
    assert metrics_of("again")["test/accuracy"] == metrics_of("run")["test/accuracy"]


def test_data_without_plain_samples_is_refused_where_a_method_calibrates_on_them():
    class OnlyBatches(LightningDataModule):
        """Training batches alone."""

    events = SimpleNamespace(calibration_batches=1, calibrates_on_plain_samples=True)
    task = SimpleNamespace(adapter=SimpleNamespace(events=events))

    with pytest.raises(ConfigError, match="'OnlyBatches' gives training batches only"):
        prepare(task, OnlyBatches())
