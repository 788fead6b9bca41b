"""Callbacks of every run: seeds, cost, and progress for those who read a log."""

from __future__ import annotations

import csv
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from peft_modal.data.seeding import seeded


class StepSeeding(Callback):
    """Seeds torch's global generator before every training batch from (seed, epoch, batch).

    Dropout then depends on nothing but the place in the run: a resumed run draws what an uninterrupted one draws, and
    neither validation nor logging moves it.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed."""
        del pl_module, batch
        torch.manual_seed(seeded("step", self.seed, trainer.current_epoch, batch_idx).initial_seed())


class History(Callback):
    """Keeps what a CSV logger wrote before an interruption: Lightning's deletes the file it finds.

    Rows of steps after the checkpoint are left out, since a resumed run makes them again.

    Args:
        logger: The logger, before anything was logged.
        path: The file it writes.
    """

    def __init__(self, logger: CSVLogger, path: Path) -> None:
        self._logger = logger
        self._rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rows again; the trainer knows by now which step it goes on from."""
        del pl_module
        kept = [row for row in self._rows if int(row["step"]) < trainer.global_step]
        for row in kept:
            figures: dict[str, torch.Tensor | float] = {
                name: _number(text) for name, text in row.items() if text and name != "step"
            }
            self._logger.log_metrics(figures, int(row["step"]))
        if kept:
            self._logger.save()
        self._rows = []


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


class Cost(Callback):
    """Measures the time of a training step (data, forward, backward, optimiser)."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps: list[float] = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pause between epochs is no step."""
        del trainer, pl_module
        self._last = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time since the last batch."""
        del trainer, pl_module, outputs, batch, batch_idx
        now = time.perf_counter()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now

    def figures(self) -> dict[str, float]:
        """`time/step_ms` (median) and `memory/peak_mb` (resident size of the process, or of the GPU's allocator)."""
        figures = {"memory/peak_mb": peak_memory_mb()}
        if self._steps:
            figures["time/step_ms"] = 1000 * statistics.median(self._steps)
        return figures


class EpochLines(Callback):
    """One line per epoch where there is no terminal to draw a progress bar on."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is logged."""
        del pl_module
        shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("train/", "val/"))}
        text = "  ".join(f"{name} {value:.4g}" for name, value in sorted(shown.items()))
        sys.stderr.write(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}\n")


def peak_memory_mb() -> float:
    """Peak of the GPU's allocator where there is one, else the peak resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mb()


def peak_resident_mb() -> float:
    """Largest resident size of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not `getrusage`: Linux lets a process start with the peak of the one that started it.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
