"""Fit: train, test, and leave one folder."""

from __future__ import annotations

import itertools
import json
import time
import zipfile
import zlib
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from peft_modal.api import Model, build
from peft_modal.compose import Composed
from peft_modal.errors import DataError, FileFormatError, TrainingError
from peft_modal.files import Header, fingerprint, load_adapter, save_adapter, versions, write_text
from peft_modal.running.callbacks import Cost
from peft_modal.running.folder import RunFolder, refuse_other_settings
from peft_modal.running.trainer import make_trainer
from peft_modal.tasks.base import Task
from peft_modal.tasks.tensors import load_tensors

_CALIBRATION_BATCHES = 16


def fit(composed: Composed, folder: RunFolder) -> dict[str, float]:
    """Train in `folder`, going on where an unfinished run stopped; test the file that was written.

    Args:
        composed: The configuration.
        folder: Where everything goes.

    Returns:
        All figures, as in `metrics.json`.
    """
    started = time.perf_counter()
    refuse_other_settings(folder, composed)
    seed_everything(composed.seed, workers=True, verbose=False)
    data = composed.nodes["data"].build()
    data.prepare_data()
    data.setup("fit")
    model = build(composed, data.class_names)
    mark = fingerprint(model.backbone.network.state_dict())
    task = model.task()
    folder.root.mkdir(parents=True, exist_ok=True)
    write_text(folder.config, composed.to_yaml())
    _prepare(task, data)
    cost = Cost()
    trainer = make_trainer(composed, folder, cost=cost)
    _train(trainer, task, data, folder)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    figures = {**metrics, **cost.figures(), **counts(model)}
    header = Header(
        config=composed.to_dict(),
        fingerprint=mark,
        class_names=model.class_names,
        preprocessing=dict(data.preprocessing),
        metrics=figures,
        versions=versions(),
    )
    _save(folder, task, header)
    # What is reported is what the file gives: it is read back before the test.
    load_tensors(task.adapter, task.head, load_adapter(folder.adapter)[0])
    figures |= test(trainer, task, data)
    figures["file/adapter_bytes"] = float(folder.adapter.stat().st_size)
    figures["time/total_s"] = time.perf_counter() - started
    _save(folder, task, Header(**{**header.__dict__, "metrics": figures}))
    write_text(folder.metrics, json.dumps(figures, indent=2, sort_keys=True) + "\n")
    return figures


def counts(model: Model) -> dict[str, float]:
    """Numbers of parameters: what the method adds, what of the backbone it trains, the head's, and all."""
    own = model.adapter.counts()
    head = sum(p.numel() for p in model.head.parameters())
    backbone = sum(p.numel() for p in model.backbone.network.parameters())
    trained = own["adapter"] + own["backbone"] + head
    total = backbone + own["adapter"] + head
    return {
        "params/adapter": float(own["adapter"]),
        "params/backbone_trained": float(own["backbone"]),
        "params/head": float(head),
        "params/total": float(total),
        "params/trained_share": trained / total,
    }


def test(trainer: Trainer, task: Task, data: LightningDataModule) -> dict[str, float]:
    """Figures on test data; none where the data has no test split."""
    data.setup("test")
    if not data.test_dataloader():
        return {}
    results = trainer.test(task, datamodule=data, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


def _prepare(task: Task, data: LightningDataModule) -> None:
    if task.adapter.events.wants("prepare"):
        batches = list(itertools.islice(iter(data.train_dataloader()), _CALIBRATION_BATCHES))
        task.eval()
        task.adapter.events.prepare(batches, lambda batch: task.losses(batch, task(batch)))
        task.train()


def _train(trainer: Trainer, task: Task, data: LightningDataModule, folder: RunFolder) -> None:
    checkpoint = _checkpoint(folder.last_checkpoint)
    # Lightning keeps the modes it finds; the frozen backbone ignores this unless its mode is `reference`.
    task.train()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning turns an interruption into an exit
        raise KeyboardInterrupt from stop
    except RuntimeError as error:
        # Checksums say nothing of the archive's own headers.
        if checkpoint is not None and "PytorchStreamReader" in str(error):
            raise FileFormatError(f"'{checkpoint}' is damaged; delete it to start the run again") from error
        if isinstance(error, TrainingError) or "out of memory" not in str(error):
            raise
        raise TrainingError("out of memory; lower data.batch_size, or use trainer.precision=bf16-mixed") from error
    if trainer.interrupted:
        raise KeyboardInterrupt


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint to go on from, if there is one, after its checksums were looked at.

    Raises:
        FileFormatError: It is damaged.
    """
    if not path.is_file():
        return None
    sentence = f"'{path}' is damaged; delete it to start the run again"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise FileFormatError(sentence) from error
    if damaged is not None:
        raise FileFormatError(sentence)
    return path


def _save(folder: RunFolder, task: Task, header: Header) -> None:
    save_adapter(folder.adapter, task.tensors(), header)


def describe(folder: RunFolder, figures: dict[str, float]) -> list[tuple[str, str]]:
    """The lines that a run ends with: what came out, how much was trained, and where the files are."""
    lines: list[tuple[str, str]] = [
        (name, f"{100 * figures[name]:.1f} %") for name in ("test/accuracy", "val/accuracy") if name in figures
    ]
    lines += [(name, f"{figures[name]:.4g}") for name in ("test/loss", "val/loss") if name in figures][
        : 0 if lines else 1
    ]
    trained = figures["params/adapter"] + figures["params/backbone_trained"] + figures["params/head"]
    lines.append(
        (
            "trained",
            f"{trained:,.0f} of {figures['params/total']:,.0f} parameters "
            f"({100 * figures['params/trained_share']:.1f} %): {figures['params/adapter']:,.0f} adapter, "
            f"{figures['params/backbone_trained']:,.0f} backbone, {figures['params/head']:,.0f} head",
        )
    )
    if "time/step_ms" in figures:
        lines.append(("cost", f"{figures['time/step_ms']:.0f} ms a step, {figures['memory/peak_mb']:,.0f} MB at most"))
    lines.append(("adapter", f"{folder.adapter} ({figures['file/adapter_bytes'] / 1e6:.2f} MB)"))
    lines.append(("metrics", str(folder.metrics)))
    return lines


def evaluate(model: Model, stage: str, *, data: LightningDataModule) -> dict[str, float]:
    """Figures of a loaded model on validation or test data.

    Raises:
        DataError: The data has no such split.
    """
    task = model.task()
    trainer = make_trainer(model.composed, None)
    data.setup("validate" if stage == "val" else "test")
    if not (data.val_dataloader() if stage == "val" else data.test_dataloader()):
        raise DataError(f"the data has no {stage} samples to measure on")
    run = trainer.validate if stage == "val" else trainer.test
    results = run(task, datamodule=data, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}
