"""Measure: an adapter file on validation or test data, with figures and report in a folder of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from lightning.pytorch import LightningDataModule

from peft_modal.api import Model
from peft_modal.counting import count_parameters
from peft_modal.data.splits import Part, SplitData
from peft_modal.errors import DataError
from peft_modal.files import write_text
from peft_modal.inspection.places import trained_places
from peft_modal.running.callbacks import peak_memory_mb
from peft_modal.running.faults import in_sentences
from peft_modal.running.folder import RunFolder
from peft_modal.running.lock import locked
from peft_modal.running.report import ReportedRun, leave_report
from peft_modal.running.trainer import make_trainer

Verb = Literal["validate", "test"]
STAGES: Final[dict[Verb, Part]] = {"validate": "val", "test": "test"}
"""The prefix of a verb's figures."""


def measure(
    verb: Verb, model: Model, *, adapter: Path, data: LightningDataModule, folder: RunFolder, command: Sequence[str]
) -> dict[str, float]:
    """Figures of a loaded model on validation or test data; leaves a report and `metrics.json`.

    Args:
        verb: Which data.
        model: The loaded adapter file.
        adapter: The file it came from.
        data: The data, set up for the verb.
        folder: Where everything goes.
        command: Arguments of `python -m peft_modal` that do the same again.

    Returns:
        All figures, as in `metrics.json`.

    Raises:
        DataError: The data has no such split.
    """
    with in_sentences(folder.root), locked(folder.root):
        folder.make_room()
        return _measure(verb, model, adapter=adapter, data=data, folder=folder, command=command)


def _measure(
    verb: Verb, model: Model, *, adapter: Path, data: LightningDataModule, folder: RunFolder, command: Sequence[str]
) -> dict[str, float]:
    started = time.perf_counter()
    task = model.task()
    task.before_test(data)
    task.suit(data.preprocessing)  # type: ignore[attr-defined]  # every data module has it
    if not (data.val_dataloader() if verb == "validate" else data.test_dataloader()):
        part = STAGES[verb]
        raise DataError(
            data.no_samples(part) if isinstance(data, SplitData) else f"the data has no {part} samples to measure on."
        )
    trainer = make_trainer(model.composed, None)
    task.start_report(seed=model.composed.seed)
    run = trainer.validate if verb == "validate" else trainer.test
    results = run(task, datamodule=data, verbose=False)
    figures = {name: float(value) for result in results for name, value in result.items()}
    figures |= task.final_figures(data)
    figures |= count_parameters(model.backbone, model.adapter, model.head).figures()
    figures["file/adapter_bytes"] = float(adapter.stat().st_size)
    figures["memory/peak_mb"] = peak_memory_mb()
    figures["time/total_s"] = time.perf_counter() - started
    # Until the new figures are complete, the folder is not finished.
    folder.metrics.unlink(missing_ok=True)
    trained = trained_places(task.adapter, task.head)
    leave_report(ReportedRun(verb, model.composed, folder, figures, task, trained, command))
    write_text(folder.metrics, json.dumps(figures, indent=2, sort_keys=True) + "\n")
    return figures
