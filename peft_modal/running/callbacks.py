"""Callbacks of every run: seeds, cost, and progress for those who read a log."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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


class Cost(Callback):
    """Measures the time of the last thousand training steps (data, forward, backward, optimiser)."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps: deque[float] = deque(maxlen=1000)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to report the time of all its steps."""
        return {"steps": list(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._steps.extend(state_dict["steps"])

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
