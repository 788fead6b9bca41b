"""Fit: train, test, and leave one folder."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from peft_modal.api import build
from peft_modal.compose import Composed
from peft_modal.counting import count_parameters
from peft_modal.data.epochs import Batch
from peft_modal.data.record import KeepsRecord
from peft_modal.data.splits import SplitData
from peft_modal.errors import ConfigError, FileFormatError
from peft_modal.files import Header, fingerprint, load_adapter, save_adapter, versions, write_text
from peft_modal.inspection.places import trained_places
from peft_modal.running.allocation import keep_freed_memory
from peft_modal.running.callbacks import Cost
from peft_modal.running.checkpoints import damaged_checkpoint, undamaged
from peft_modal.running.faults import in_sentences
from peft_modal.running.folder import RunFolder, refuse_other_settings
from peft_modal.running.history import History, Table
from peft_modal.running.lock import locked
from peft_modal.running.report import ReportedRun, leave_report
from peft_modal.running.selection import Selection
from peft_modal.running.trainer import make_trainer
from peft_modal.tasks.base import Task
from peft_modal.tasks.tensors import load_tensors


def fit(composed: Composed, folder: RunFolder) -> dict[str, float]:
    """Train in `folder`, going on where an unfinished run stopped; test the file that was written.

    Args:
        composed: The configuration.
        folder: Where everything goes.

    Returns:
        All figures, as in `metrics.json`.
    """
    with in_sentences(folder.root), locked(folder.root):
        return _fit(composed, folder)


def _fit(composed: Composed, folder: RunFolder) -> dict[str, float]:
    started = time.perf_counter()
    folder.refuse_finished()  # once more: another process may have finished it meanwhile
    refuse_other_settings(folder, composed)
    keep_freed_memory()
    seed_everything(composed.seed, workers=True, verbose=False)
    data = composed.nodes["data"].build()
    data.prepare_data()
    data.setup("fit")
    model = build(composed, data.class_names)
    mark = fingerprint(model.backbone.network.state_dict())
    task = model.task()
    task.before_fit(data)
    task.suit(data.preprocessing)
    table = Table(folder.root / "metrics.csv")
    cost, history, selection = Cost(), History(table), Selection(task, folder.best_checkpoint)
    trainer = make_trainer(composed, folder, callbacks=(cost, history, selection), table=table)
    selection.refuse_without_validation(trainer, data)
    # Only now: what an older run left is worth more than a configuration that cannot start.
    folder.make_room()
    write_text(folder.config, composed.to_yaml())
    if isinstance(data, KeepsRecord):
        write_text(folder.data, json.dumps(data.record(), indent=1) + "\n")
    prepare(task, data)
    trained = trained_places(task.adapter, task.head)
    _train(trainer, task, data, folder)
    counts = count_parameters(model.backbone, model.adapter, model.head)
    figures = {**history.figures, **selection.figures(), **cost.figures(), **counts.figures()}
    header = Header(
        config=composed.to_dict(),
        fingerprint=mark,
        class_names=model.class_names,
        preprocessing=dict(data.preprocessing),
        metrics=figures,
        versions=versions(),
        facts=task.adapter.facts(),
    )
    _save(folder, task, header)
    # What is reported is what the file gives: it is read back before the test.
    load_tensors(task.adapter, task.head, load_adapter(folder.adapter)[0])
    task.start_report(seed=composed.seed)
    figures |= test(trainer, task, data)
    # A trial of the loop is no model whose pictures are worth waiting for.
    if not getattr(trainer, "fast_dev_run", False):
        figures |= task.final_figures(data)
    figures["file/adapter_bytes"] = float(folder.adapter.stat().st_size)
    figures["time/total_s"] = time.perf_counter() - started
    _save(folder, task, Header(**{**header.__dict__, "metrics": figures}))
    command = ("fit", "--config", str(folder.config), "--out", f"{folder.root}-again")
    leave_report(ReportedRun("fit", composed, folder, figures, task, trained, command))
    write_text(folder.metrics, json.dumps(figures, indent=2, sort_keys=True) + "\n")
    return figures


def test(trainer: Trainer, task: Task, data: LightningDataModule) -> dict[str, float]:
    """Figures on test data; none where the data has no test split."""
    data.setup("test")
    if not data.test_dataloader():
        return {}
    results = trainer.test(task, datamodule=data, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


def prepare(task: Task, data: LightningDataModule) -> None:
    """Let a method that calibrates itself see some training batches; the optimiser does not exist yet.

    Raises:
        ConfigError: It wants the training samples as they are, and the data gives training batches only.
    """
    events = task.adapter.events
    if count := events.calibration_batches:
        loader = _plain_samples(data) if events.calibrates_on_plain_samples else data.train_dataloader()
        batches = itertools.islice(loader, count)
        task.eval()
        task.adapter.events.prepare(batches, lambda batch: task.losses(batch, task(batch)))
        task.train()


def _plain_samples(data: LightningDataModule) -> DataLoader[Batch]:
    if not isinstance(data, SplitData):
        raise ConfigError(
            f"data: the method calibrates on training samples as they are, and '{type(data).__name__}' gives training "
            "batches only; derive it from peft_modal.data.splits.SplitData"
        )
    return data.plain_train_dataloader()


def _train(trainer: Trainer, task: Task, data: LightningDataModule, folder: RunFolder) -> None:
    checkpoint = undamaged(folder.last_checkpoint) if folder.last_checkpoint.is_file() else None
    # Lightning keeps the modes it finds; the frozen backbone ignores this unless its mode is `reference`.
    task.train()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning turns an interruption into an exit
        raise KeyboardInterrupt from stop
    except RuntimeError as error:
        # Checksums say nothing of the archive's own headers.
        if checkpoint is not None and "PytorchStreamReader" in str(error):
            raise FileFormatError(damaged_checkpoint(checkpoint)) from error
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def _save(folder: RunFolder, task: Task, header: Header) -> None:
    save_adapter(folder.adapter, task.tensors(), header)


def describe(folder: RunFolder, figures: dict[str, float], compared: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The lines that a run ends with: what came out, how much was trained, and where the files are.

    Args:
        folder: Of the run.
        figures: All of them.
        compared: Which of them count beside accuracy and loss.
    """
    lines: list[tuple[str, str]] = [
        (name, f"{100 * figures[name]:.1f} %") for name in ("test/accuracy", "val/accuracy") if name in figures
    ]
    lines += [(name, f"{figures[name]:.4g}") for name in ("test/loss", "val/loss") if name in figures][
        : 0 if lines else 1
    ]
    lines += [(name, f"{figures[name]:.4g}") for name in compared if name in figures]
    if "best/epoch" in figures:
        (value,) = (key for key in figures if key.startswith("best/") and key != "best/epoch")
        lines.append(
            ("best", f"{value.removeprefix('best/')} {figures[value]:.4g} in epoch {figures['best/epoch'] + 1:.0f}")
        )
    if "stopped/epoch" in figures:
        lines.append(("stopped early", f"after epoch {figures['stopped/epoch'] + 1:.0f}: no better validation since"))
    parts = {"adapter": "adapter", "backbone_trained": "backbone", "head": "head", "training_only": "training only"}
    counts = {what: figures[f"params/{name}"] for name, what in parts.items()}
    lines.append(
        (
            "trained",
            f"{sum(counts.values()):,.0f} of {figures['params/total']:,.0f} parameters "
            f"({100 * figures['params/trained_share']:.1f} %): "
            + ", ".join(f"{n:,.0f} {what}" for what, n in counts.items() if n or what != "training only"),
        )
    )
    if "time/step_ms" in figures:
        lines.append(("cost", f"{figures['time/step_ms']:.0f} ms a step, {figures['memory/peak_mb']:,.0f} MB at most"))
    lines.append(("adapter", f"{folder.adapter} ({figures['file/adapter_bytes'] / 1e6:.2f} MB)"))
    lines.append(("metrics", str(folder.metrics)))
    lines += [("report", str(folder.reports[0]))] if folder.reports[0].is_file() else []
    return lines
