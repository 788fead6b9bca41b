"""A run that was interrupted goes on where it stopped."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from point_cloud_runs import IDPT, PRETRAIN
from tiny_runs import InterruptInEpoch, measured

import peft_modal
from peft_modal.cli.main import main


class InterruptAtEpoch(Callback):
    """Ctrl-C at the start of the third epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


class InterruptAfterValidation(Callback):
    """Ctrl-C when the third epoch's figures are logged and its checkpoint is not yet written."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


class InterruptInFirst(Callback):
    """Ctrl-C before the second batch of the run, when there is no checkpoint yet."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            raise KeyboardInterrupt


class Poison(Callback):
    """NaN in the head's weights from the third epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            with torch.no_grad():
                next(pl_module.head.parameters()).fill_(float("nan"))


def fit_with(callback, arguments, monkeypatch):
    """The code that `fit` ends with when a callback of the test comes first."""
    from peft_modal.running import fit as module

    make = module.make_trainer

    def with_callback(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.callbacks.insert(0, callback)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_trainer", with_callback)
        return main(["fit", *arguments])


@pytest.mark.parametrize(
    ("interrupt", "goes_on_at"),
    [(InterruptAtEpoch, 3), (InterruptInEpoch, 3), (InterruptAfterValidation, 3), (InterruptInFirst, 1)],
)
def test_an_interrupted_run_that_goes_on_gives_what_an_uninterrupted_one_gives(
    run, monkeypatch, capsys, interrupt, goes_on_at
):
    assert fit_with(interrupt(), [*IDPT, "--out", "stopped"], monkeypatch) == 130
    assert not Path("stopped/metrics.json").exists()
    capsys.readouterr()
    assert main(["fit", *IDPT, "--out", "stopped"]) == 0

    epochs = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert epochs == [f"{epoch}/3" for epoch in range(goes_on_at, 4)]
    assert measured("stopped") == measured(run)
    assert Path("stopped/metrics.csv").read_text() == (run / "metrics.csv").read_text()


@pytest.mark.parametrize("arguments", [[*IDPT, "--backbone.frozen_mode=reference"], PRETRAIN], ids=["drift", "masked"])
def test_statistics_drop_path_and_masks_go_on_where_they_stopped(monkeypatch, arguments):
    assert main(["fit", *arguments, "--out", "run"]) == 0
    assert fit_with(InterruptInEpoch(), [*arguments, "--out", "stopped"], monkeypatch) == 130
    assert main(["fit", *arguments, "--out", "stopped"]) == 0

    assert measured("stopped") == measured("run")


def test_a_loss_that_is_not_finite_keeps_what_was_saved(run, monkeypatch, capsys):
    assert fit_with(Poison(), [*IDPT, "--out", "stopped"], monkeypatch) == 2
    assert "not finite at epoch 2" in capsys.readouterr().err
    assert not Path("stopped/metrics.json").exists()
    assert main(["fit", *IDPT, "--out", "stopped"]) == 0

    assert measured("stopped") == measured(run)


def test_a_run_that_ends_within_its_report_is_not_finished(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_modal.running.report.write_report", interrupted)
        assert main(["fit", *IDPT, "--out", "stopped"]) == 130

    assert not Path("stopped/metrics.json").exists()
    assert main(["fit", *IDPT, "--out", "stopped"]) == 0
    assert Path("stopped/report.html").is_file()
    assert measured("stopped").items() <= measured(run).items()
    assert "test/accuracy" in measured("stopped")


def test_a_checkpoint_holds_no_frozen_tensor(run):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 — our own file
    frozen = peft_modal.load(run / "adapter.safetensors").backbone.network.state_dict()

    assert {name for name in state if name.startswith("backbone.")} == {"backbone.cls_token", "backbone.cls_pos"}
    assert not [name for name in state if name in frozen]


@pytest.mark.parametrize("damage", ["random", "truncated", "flipped", "headers"])
def test_a_damaged_checkpoint_ends_in_a_sentence(run, capsys, damage):
    checkpoint = run / "checkpoints/last.ckpt"
    whole = checkpoint.read_bytes()
    middle = len(whole) // 2
    disk = whole.rindex(b"PK\6\6") + 16  # zipfile does not look at it, torch does
    contents = {
        "random": b"garbage!",
        "headers": whole[:disk] + bytes([whole[disk] ^ 2]) + whole[disk + 1 :],
        "truncated": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    checkpoint.write_bytes(contents[damage])
    (run / "metrics.json").unlink()

    assert main(["fit", *IDPT, "--out", "run"]) == 2
    assert "last.ckpt' is damaged; delete it" in capsys.readouterr().err


def test_an_unfinished_run_does_not_go_on_with_other_settings(run, capsys):
    (run / "metrics.json").unlink()

    assert main(["fit", *IDPT, "--method.prompt_layer=0", "--out", "run"]) == 2
    assert "method.prompt_layer (was -1, now 0)" in capsys.readouterr().err
    assert main(["fit", *IDPT, "--out", "run"]) == 0
