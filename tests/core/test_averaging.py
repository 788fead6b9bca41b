"""The moving average of what is trained: its formula, and who sees it when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from tiny_backbones import TinyViT
from tiny_runs import ARGUMENTS, measured, tensors_of, write_clouds
from torch import Tensor, nn
from torch.utils.data import DataLoader

import peft_modal.running.fit as fit_module
from peft_modal.cli.main import main
from peft_modal.compose import compose
from peft_modal.errors import ConfigError
from peft_modal.methods.lora import LoRA
from peft_modal.tasks.averaging import MovingAverage
from peft_modal.tasks.classification import Classification
from peft_modal_heads.linear import LinearHead

DECAY = 0.6


def averaged(values: list[Tensor], decay: float) -> Tensor:
    """The recursion, written down; the first values are taken as they are."""
    mean = values[0]
    for step, value in enumerate(values[1:], start=1):
        d = min(decay, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * value
    return mean


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_the_average_follows_the_formula_with_its_warm_up(decay: float) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    average, values = MovingAverage(decay), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parameter.data = torch.randn(3, generator=generator)
        values.append(parameter.data.clone())
        average.update({"p": parameter})
        torch.testing.assert_close(average.values["p"], averaged(values, decay), rtol=0, atol=1e-6)


def test_what_is_new_or_has_another_shape_starts_from_its_value() -> None:
    average = MovingAverage(0.9)
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((3,), 5.0))
    average.update({"a": first})
    average.update({"a": second, "b": first})
    assert torch.equal(average.values["a"], second.data)
    assert torch.equal(average.values["b"], first.data)
    assert average.values["a"] is not second.data


def test_putting_in_place_twice_and_taking_out_gives_back_what_training_made() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    average = MovingAverage(0.9)
    average.put_in_place({"p": parameter})
    assert not average.is_in_place  # there is nothing yet
    for value in (1.0, 2.0):
        parameter.data.fill_(value)
        average.update({"p": parameter})
    expected = averaged([torch.tensor(1.0), torch.tensor(2.0)], 0.9).expand(2)
    for _ in range(2):
        average.put_in_place({"p": parameter})
        assert average.is_in_place
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(average.trained_values()["p"], torch.full((2,), 2.0))
    average.take_out({"p": parameter})
    assert torch.equal(parameter.data, torch.full((2,), 2.0))
    assert average.trained_values() == {}


# In a run.


class Watch(Callback):
    """Copies of what is trained after each step, and in each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.checkpoints: list[dict[str, Any]] = []

    @staticmethod
    def _now(task: Classification) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in task.named_trained().items()}

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step:
            self.steps.append(self._now(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validated.append(self._now(pl_module))
        checkpoint: dict[str, Any] = {}
        pl_module.on_save_checkpoint(checkpoint)
        self.checkpoints.append(copy.deepcopy(checkpoint))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.steps.append(self._now(pl_module))


def make_task(**options: Any) -> Classification:
    torch.manual_seed(3)
    backbone = TinyViT(depth=1)
    adapter = LoRA(rank=2).attach(backbone, generator=torch.Generator().manual_seed(0))
    return Classification(backbone, adapter, LinearHead(backbone.feature_spec(), 3), ("a", "b", "c"), **options)


def fit(task: Classification) -> Watch:
    generator = torch.Generator().manual_seed(0)
    items = [{"image": torch.randn(3, 16, 16, generator=generator), "label": torch.tensor(i % 3)} for i in range(6)]
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[watch],
    )  # fmt: skip
    trainer.fit(task.train(), DataLoader(items, batch_size=2), DataLoader(items, batch_size=6))
    return watch


def test_validation_and_the_end_see_the_average_and_training_what_it_made() -> None:
    plain_task, task = make_task(lr=0.01), make_task(lr=0.01, ema_decay=DECAY)
    plain, watch = fit(plain_task), fit(task)

    assert len(watch.steps) == len(plain.steps) == 6
    for name, trained in plain.steps[-1].items():
        history = [values[name] for values in plain.steps]
        # Training itself does not feel that it is averaged.
        assert all(torch.equal(values[name], value) for values, value in zip(watch.steps, history, strict=True))
        for epoch, steps in enumerate((3, 6)):
            expected = averaged(history[:steps], DECAY)
            torch.testing.assert_close(watch.validated[epoch][name], expected, rtol=0, atol=1e-6)
            # A checkpoint that is written meanwhile goes on from what training made.
            saved = watch.checkpoints[epoch]
            assert torch.equal(saved["state_dict"][name], history[steps - 1])
            torch.testing.assert_close(saved["average"]["values"][name], expected, rtol=0, atol=1e-6)
        assert torch.equal(task.tensors()[name], watch.validated[-1][name])
        assert torch.equal(plain_task.tensors()[name], trained)
    assert any(not torch.equal(watch.validated[-1][name], plain.steps[-1][name]) for name in plain.steps[-1])


def test_a_restored_average_goes_on_as_if_nothing_had_happened() -> None:
    task = make_task(ema_decay=DECAY)
    watch = fit(task)
    restored = make_task(ema_decay=DECAY)
    restored.on_load_checkpoint(watch.checkpoints[0])

    assert restored.average.steps == 3
    # What was restored is a copy.
    values = watch.checkpoints[0]["average"]["values"]
    assert all(
        torch.equal(restored.average.values[n], v) and restored.average.values[n] is not v for n, v in values.items()
    )


# Whole runs.


RUN = [
    "fit", *(argument for argument in ARGUMENTS if "max_epochs" not in argument), "--trainer.max_epochs=4",
    "--task.lr=0.05", f"--task.ema_decay={DECAY}",
]  # fmt: skip


class Scripted(Callback):
    """Lets validation say that the second epoch was best, and keeps what it saw there."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.seen: dict[str, bytes] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.stop_at:
            raise KeyboardInterrupt

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("val/scripted", torch.tensor([0.2, 0.9, 0.5, 0.1][trainer.current_epoch]))
        if trainer.current_epoch == 1:
            self.seen = {name: value.detach().numpy().tobytes() for name, value in pl_module.tensors().items()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Classification, "selection", ("val/scripted", "max"))
    write_clouds(tmp_path / "good", {"a": 6, "b": 6})
    make = fit_module.make_trainer

    def run(scripted: Scripted, *arguments: str) -> int:
        def with_callback(*args: Any, **options: Any) -> pl.Trainer:
            trainer = make(*args, **options)
            trainer.callbacks.insert(0, scripted)
            return trainer

        monkeypatch.setattr(fit_module, "make_trainer", with_callback)
        return main([*RUN, *arguments])

    return run


def test_the_best_state_is_the_averaged_one_interrupted_or_not(run: Any) -> None:
    whole = Scripted()
    assert run(whole, "--task.keep=best", "--out", "run") == 0
    assert tensors_of("run") == whole.seen

    assert run(Scripted(stop_at=3), "--task.keep=best", "--out", "stopped") == 130
    assert run(Scripted(), "--task.keep=best", "--out", "stopped") == 0
    assert tensors_of("stopped") == tensors_of("run")
    assert measured("stopped") == measured("run")


def test_a_decay_outside_its_range_ends_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"task\.ema_decay"):
        compose(overrides=[*(item.removeprefix("--") for item in ARGUMENTS), "task.ema_decay=1.5"])
