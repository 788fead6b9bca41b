"""Figures over time: `metrics.csv`, and what a run that is resumed has to remember of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from typing_extensions import override

from peft_modal.files import write_text


class Table(Logger):
    """Writes a CSV file with a row for everything that is logged, always as a whole.

    Lightning's own logger deletes the file it finds and appends to the new one: a run that is killed and resumed
    would lose rows.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, float]] = []

    @property
    @override
    def name(self) -> str:
        """None is needed: a folder holds one run."""
        return ""

    @property
    @override
    def version(self) -> str:
        """None is needed: a folder holds one run."""
        return ""

    @override
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Add a row."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.rows.append({**row, "step": len(self.rows) if step is None else step})

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration has a file of its own."""

    @override
    def save(self) -> None:
        """Write the file."""
        if not self.rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=sorted(set().union(*self.rows)))
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


class History(Callback):
    """Keeps the rows of the table and the latest figures in the checkpoint, so that a resumed run has them.

    Args:
        table: The table of the run.

    Attributes:
        figures: The latest value of all that was logged, by name.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._rows: list[dict[str, float]] = []
        self.figures: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of before an interruption again; the checkpoint was read by now."""
        del trainer, pl_module
        self._table.rows = list(self._rows)
        self._table.save()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the checkpoint has to hold; the epoch's own row comes into the table after it is written."""
        del pl_module
        self.figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("train/")}
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        self._rows = [*self._table.rows, *([{**row, **place}] if row else [])]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Rows and figures up to the end of the last complete epoch."""
        return {"rows": self._rows, "figures": self.figures}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._rows, self.figures = state_dict["rows"], state_dict["figures"]
