"""Which state of a run is kept, and when it stops: both by the task's figure on validation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from peft_modal.errors import ConfigError, TrainingError
from peft_modal.running.checkpoints import read_tensors_of
from peft_modal.tasks.base import Task
from peft_modal.tasks.tensors import load_tensors


class Selection(Callback):
    """Follows `Task.selection` over the validations of a run, for `task.keep` and `task.patience`.

    Of equal values the earliest counts. What it remembers is part of every checkpoint, so a resumed run keeps and
    stops as an uninterrupted one does.

    Args:
        task: The task of the run.
        best: Where the state of the best validation is kept.
    """

    def __init__(self, task: Task, best: Path) -> None:
        self._task = task
        self._path = best
        self._name, mode = task.selection
        self._sign = 1.0 if mode == "max" else -1.0
        self._best: dict[str, float] = {}
        self._epoch = -1
        self._waited = 0
        self._stopped_at = -1

    @property
    def is_needed(self) -> bool:
        """Whether the task asks for any of this."""
        return self._task.keep == "best" or self._task.patience is not None

    def refuse_without_validation(self, trainer: Trainer, data: LightningDataModule) -> None:
        """Refuse a run that would never validate.

        Raises:
            ConfigError: Says why it would not.
        """
        if not self.is_needed:
            return
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if not data.val_dataloader():
            reason = "the data has no validation samples"
        elif trainer.limit_val_batches == 0:
            reason = "trainer.limit_val_batches is 0"
        elif every is not None and epochs is not None and 0 < epochs < every:
            reason = f"trainer.check_val_every_n_epoch is {every}, of {epochs} epochs"
        else:
            return
        asked = "keep: 'best'" if self._task.keep == "best" else f"patience: {self._task.patience}"
        raise ConfigError(f"task.{asked} needs validation, and there is none: {reason}")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where the run that goes on had stopped."""
        del pl_module
        if self._stopped_at >= 0:
            trainer.should_stop = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, keep, and stop.

        Raises:
            TrainingError: The task logs no such figure.
        """
        del pl_module
        if not self.is_needed or trainer.sanity_checking:
            return
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self._name not in figures:
            raise TrainingError(
                f"the task selects by '{self._name}', which it does not log; it logs {', '.join(sorted(figures))}"
            )
        # The same on all processes, or they would part ways.
        value = float(trainer.strategy.reduce(torch.tensor(figures[self._name]), reduce_op="mean"))
        if not self._best or self._sign * value > self._sign * self._best[self._name]:
            self._best = {**figures, self._name: value}
            self._epoch, self._waited = trainer.current_epoch, 0
            if self._task.keep == "best":
                trainer.save_checkpoint(self._path, weights_only=True)
            return
        self._waited += 1
        patience = self._task.patience
        if patience is not None and self._waited >= patience and trainer.current_epoch + 1 >= (trainer.min_epochs or 0):
            self._stopped_at = trainer.current_epoch
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the state that is kept; the task finalises after this.

        Raises:
            TrainingError: No validation took place.
        """
        del trainer, pl_module
        if self.is_needed and not self._best:
            raise TrainingError("no validation took place, so task.keep and task.patience had nothing to go by")
        if self._task.keep == "best":
            tensors = read_tensors_of(self._path)
            load_tensors(self._task.adapter, self._task.head, tensors, training_only=True)

    def figures(self) -> dict[str, float]:
        """What the run's figures get from here; empty where the task asks for nothing.

        `best/epoch` and the value reached there, under `best/` and its name; `stopped/epoch` where patience ended; and
        where the best state is kept, its `val/` figures. Epochs count from 0, as in `metrics.csv`.
        """
        if not self._best:
            return {}
        name = self._name.replace("/", "_")
        figures = {"best/epoch": float(self._epoch), f"best/{name}": self._best[self._name]}
        if self._stopped_at >= 0:
            figures["stopped/epoch"] = float(self._stopped_at)
        return {**figures, **(self._best if self._task.keep == "best" else {})}

    @override
    def state_dict(self) -> dict[str, Any]:
        """See the class."""
        return {"best": self._best, "epoch": self._epoch, "waited": self._waited, "stopped_at": self._stopped_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._best, self._epoch = state_dict["best"], state_dict["epoch"]
        self._waited, self._stopped_at = state_dict["waited"], state_dict["stopped_at"]
