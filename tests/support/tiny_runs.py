"""Whole runs through the command line, as small as they get: eight clouds of two classes, LoRA, three epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback

from peft_modal.files import load_adapter

ARGUMENTS = [
    "--backbone=point_mae", "--backbone.weights=random", "--backbone.init=torch", "--backbone.dim=24",
    "--backbone.depth=2", "--backbone.num_heads=3", "--backbone.num_group=8", "--backbone.group_size=4",
    "--backbone.pointnet_dims=[8,16,16]", "--method=lora", "--method.rank=2", "--method.dropout=0.1", "--head=linear",
    "--task=classification", "--task.lr=0.01", "--data=folder", "--data.root=good", "--data.num_points=32",
    "--data.batch_size=4", "--trainer.max_epochs=3", "--trainer.accelerator=cpu",
]  # fmt: skip


def write_clouds(root: Path, counts: dict[str, int] | None = None) -> None:
    """A folder with as many clouds per class as `counts` says."""
    for label, (name, count) in enumerate((counts or {"a": 12, "b": 12}).items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            points = np.random.default_rng(100 * label + i).normal(size=(48, 3)) * (1, 1, 1 + label)
            np.save(root / name / f"{i}.npy", points.astype(np.float32))


class InterruptInEpoch(Callback):
    """Ctrl-C before the second batch of the third epoch; with accumulated gradients that is within a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        del pl_module, batch
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise KeyboardInterrupt


def metrics_of(folder: str | Path) -> dict[str, float]:
    """What `metrics.json` holds."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def measured(folder: str | Path) -> dict[str, float]:
    """Figures that do not depend on the machine's mood."""
    return {k: v for k, v in metrics_of(folder).items() if not k.startswith(("time/", "memory/", "file/"))}


def tensors_of(folder: str | Path) -> dict[str, list[int]]:
    """Every tensor of the adapter file, bit by bit."""
    tensors, _ = load_adapter(Path(folder) / "adapter.safetensors")
    return {name: value.numpy().tobytes() for name, value in tensors.items()}
