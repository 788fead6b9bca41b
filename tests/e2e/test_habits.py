"""Best-validation states, early stopping and class weights, through the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import ARGUMENTS, measured, metrics_of, tensors_of, write_clouds

from peft_modal.cli.main import main
from peft_modal.running import fit as module
from peft_modal.tasks.classification import Classification

RUN = ["fit", *ARGUMENTS, "--trainer.max_epochs=6", "--task.lr=0.05"]


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    write_clouds(tmp_path / "good")


class Scripted(Callback):
    """Lets validation accuracy take the given values, epoch by epoch, and remembers each epoch's tensors."""

    values = (0.5, 0.75, 0.25, 0.75, 0.5, 0.5)

    def __init__(self):
        self.tensors = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.tensors.append({name: value.clone() for name, value in pl_module.tensors().items()})
        pl_module.log("val/scripted", torch.tensor(self.values[trainer.current_epoch]))


class InterruptAt(Callback):
    """Ctrl-C at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def fit_with(callbacks, arguments, monkeypatch):
    make = module.make_trainer

    def with_callbacks(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.callbacks[:0] = callbacks
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_trainer", with_callbacks)
        patch.setattr(Classification, "selection", ("val/scripted", "max"))
        return main([*RUN, *arguments])


def test_the_state_of_the_best_validation_is_kept_and_tested(monkeypatch, capsys):
    scripted = Scripted()
    assert fit_with([scripted], ["--task.keep=best", "--out", "best"], monkeypatch) == 0
    printed = capsys.readouterr().out

    best = scripted.tensors[1]
    assert tensors_of("best") == {name: value.numpy().tobytes() for name, value in best.items()}
    figures = metrics_of("best")
    assert figures["best/epoch"] == 1
    assert figures["best/val_scripted"] == figures["val/scripted"] == 0.75
    assert "epoch 2" in printed
    with Path("best/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert figures["val/loss"] == pytest.approx(float(rows[1]["val/loss"]), rel=1e-6)
    main(["validate", "--adapter", "best/adapter.safetensors", "--json"])
    assert str(figures["val/loss"])[:8] in capsys.readouterr().out


def test_the_last_state_is_kept_unless_asked(monkeypatch):
    scripted = Scripted()
    assert fit_with([scripted], ["--out", "last"], monkeypatch) == 0

    assert tensors_of("last") == {name: value.numpy().tobytes() for name, value in scripted.tensors[-1].items()}
    assert not [name for name in metrics_of("last") if name.startswith(("best/", "stopped/"))]
    assert not Path("last/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize("epoch", [1, 3])
def test_patience_and_the_best_state_survive_an_interruption(monkeypatch, capsys, epoch):
    habits = ["--task.keep=best", "--task.patience=2"]
    assert fit_with([Scripted()], [*habits, "--out", "run"], monkeypatch) == 0
    assert "stopped early" in capsys.readouterr().out
    assert fit_with([Scripted(), InterruptAt(epoch)], [*habits, "--out", "stopped"], monkeypatch) == 130
    assert fit_with([Scripted()], [*habits, "--out", "stopped"], monkeypatch) == 0

    assert measured("stopped") == measured("run")
    assert measured("run")["stopped/epoch"] == 3
    assert tensors_of("stopped") == tensors_of("run")
    assert Path("stopped/metrics.csv").read_text() == Path("run/metrics.csv").read_text()


def test_a_run_that_had_stopped_does_not_train_again(monkeypatch, capsys):
    habits = ["--task.patience=2", "--out", "run"]
    assert fit_with([Scripted()], habits, monkeypatch) == 0
    before = measured("run"), tensors_of("run")
    Path("run/metrics.json").unlink()
    Path("run/adapter.safetensors").unlink()
    capsys.readouterr()
    assert fit_with([Scripted()], habits, monkeypatch) == 0

    assert "epoch " not in capsys.readouterr().err
    assert (measured("run"), tensors_of("run")) == before


def test_patience_leaves_the_schedule_and_the_state_of_a_run_that_does_not_stop_alone():
    assert main([*RUN, "--out", "plain"]) == 0
    assert main([*RUN, "--task.patience=6", "--out", "patient"]) == 0

    assert tensors_of("patient") == tensors_of("plain")


def test_balanced_weights_come_from_the_training_labels(monkeypatch, tmp_path):
    write_clouds(tmp_path / "unbalanced", {"a": 20, "b": 10})
    seen = {}

    def look(self):
        seen["weights"] = self.loss_weights

    monkeypatch.setattr(Classification, "on_train_start", look)
    arguments = [*RUN, "--trainer.max_epochs=1", "--data.root=unbalanced"]
    assert main([*arguments, "--task.class_weights=balanced", "--out", "balanced"]) == 0
    # 14 and 7 clouds are left to train on.
    torch.testing.assert_close(seen["weights"], torch.tensor([21 / 28, 21 / 14]))
    assert main([*arguments, "--task.class_weights=[0.75,1.5]", "--out", "listed"]) == 0
    assert main([*arguments, "--out", "plain"]) == 0

    assert tensors_of("listed") == tensors_of("balanced")
    assert tensors_of("plain") != tensors_of("balanced")


def test_help_lists_what_a_task_inherits(capsys):
    assert main(["fit", "--task.help", "classification"]) == 0
    text = capsys.readouterr().out
    for name in ("lr", "clip_scope", "keep", "patience", "class_weights", "votes"):
        assert f" {name} " in text
    assert "Stop after this many validations in a row without a better one" in text
