"""Training steps of two configurations, timed in turns in one process, or the memory of one.

Both train through Lightning as `fit` does (losses, the method's events, clipping, optimiser, schedule) on one batch of
the data, so that reading data is not timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from peft_modal.api import build
from peft_modal.compose import Composed, compose
from peft_modal.files import write_text
from peft_modal.running.callbacks import peak_memory_mb
from peft_modal.running.fit import prepare
from peft_modal.running.trainer import make_trainer

_STEPS: Final = 3
"""Steps of one turn."""
_TRAINER: Final[dict[str, Any]] = {
    "max_epochs": 1, "min_epochs": None, "max_steps": -1, "min_steps": None, "max_time": None, "limit_val_batches": 0,
    "limit_train_batches": 1.0, "overfit_batches": 0.0, "val_check_interval": None, "fast_dev_run": False,
    "callbacks": None, "logger": False, "profiler": None, "devices": 1, "num_nodes": 1, "strategy": "auto",
    "enable_progress_bar": False,
}  # fmt: skip
"""What a run of a few steps on one device has instead of the configuration's; precision and accumulation stay."""


class Repeated:
    """One batch, again and again."""

    def __init__(self, batch: Any, count: int) -> None:  # noqa: ANN401 — a batch is anything
        self._batch, self._count = batch, count

    def __iter__(self) -> Iterator[Any]:
        """The same batch `count` times."""
        return itertools.repeat(self._batch, self._count)

    def __len__(self) -> int:
        """The count."""
        return self._count


class Turns:
    """Lets two threads run one at a time, in turns."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._turn = 0
        self._left: set[int] = set()

    def wait(self, arm: int) -> None:
        """Wait until it is this arm's turn, or the other has left."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == arm or 1 - arm in self._left)

    def pass_on(self, arm: int) -> None:
        """Give the turn to the other arm."""
        with self._condition:
            self._turn = 1 - arm
            self._condition.notify_all()

    def leave(self, arm: int) -> None:
        """This arm is done, or has failed; the other need not wait any more."""
        with self._condition:
            self._left.add(arm)
            self._turn = 1 - arm
            self._condition.notify_all()


class Timer(Callback):
    """Times whole steps, from the start of a batch to the start of the next, and passes the turn on after each few."""

    def __init__(self, turns: Turns, arm: int) -> None:
        self.turns_s: list[float] = []
        """Seconds of each turn."""
        self._turns, self._arm = turns, arm
        self._count, self._started = 0, 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first batch waits for the arm's first turn."""
        del pl_module, batch, batch_idx
        if self._count == 0:
            self._turns.wait(self._arm)
            self._started = _now(trainer)
        elif self._count % _STEPS == 0:
            self._close(trainer)
            self._turns.pass_on(self._arm)
            self._turns.wait(self._arm)
            self._started = _now(trainer)
        self._count += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last turn ends with the epoch."""
        del pl_module
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        self.turns_s.append(_now(trainer) - self._started)


def train(composed: Composed, steps: int, *, callback: Callback | None = None) -> None:
    """Train for some steps on one batch of the data; nothing is written.

    Args:
        composed: The configuration.
        steps: How many batches.
        callback: Watches.
    """
    trainer_values = {key: value for key, value in _TRAINER.items() if key in composed.trainer}
    composed = dataclasses.replace(composed, trainer={**composed.trainer, **trainer_values})
    data = composed.nodes["data"].build()
    data.prepare_data()
    data.setup("fit")
    task = build(composed, data.class_names).task()
    task.before_fit(data)
    prepare(task, data)
    batch = next(iter(data.train_dataloader()))
    trainer = make_trainer(composed, None, callbacks=() if callback is None else [callback])
    task.train()
    trainer.fit(task, train_dataloaders=Repeated(batch, steps))


def pair(reference: Composed, other: Composed, rounds: int) -> dict[str, float]:
    """Median step times in milliseconds, and the median over rounds of their ratio (other over reference).

    A first round of each is warm-up.

    Raises:
        Exception: What one of the two trainings failed with.
    """
    turns = Turns()
    timers = [Timer(turns, arm) for arm in (0, 1)]
    failures: list[BaseException] = []

    def run(arm: int, composed: Composed) -> None:
        try:
            # Not built at once, either: libraries that import their parts lazily cannot do so in two threads.
            turns.wait(arm)
            train(composed, _STEPS * (rounds + 1), callback=timers[arm])
        except BaseException as error:  # noqa: BLE001 — raised again in the main thread
            failures.append(error)
        finally:
            turns.leave(arm)

    threads = [threading.Thread(target=run, args=item) for item in enumerate((reference, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    base, own = ([seconds / _STEPS for seconds in timer.turns_s[1:]] for timer in timers)
    ratios = [b / a for a, b in zip(base, own, strict=True)]
    return {
        "reference_ms": 1000 * statistics.median(base),
        "step_ms": 1000 * statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def peak(composed: Composed) -> float:
    """MiB that training takes at most, on top of what the libraries take; on a GPU, of its allocator.

    A fresh process is needed: on a CPU the largest resident size ever is what can be read.
    """
    before = 0.0 if torch.cuda.is_available() else peak_memory_mb()
    train(composed, 2 * _STEPS)
    return peak_memory_mb() - before


def main(argv: Sequence[str]) -> int:
    """Measure and write JSON: `pair REFERENCE.yaml CONFIG.yaml ROUNDS OUT.json`, or `peak CONFIG.yaml OUT.json`."""
    from peft_modal.running.trainer import quieten

    quieten()
    kind, *names, out = argv
    seed_everything(0, workers=True, verbose=False)
    if kind == "pair":
        reference, other, rounds = names
        figures = pair(compose(Path(reference)), compose(Path(other)), int(rounds))
    else:
        figures = {"peak_mb": peak(compose(Path(names[0])))}
    write_text(Path(out), json.dumps(figures) + "\n")
    return 0


def _now(trainer: Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
