"""The folder of one run: what lies where, and whether the run is new, unfinished or done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from peft_modal.compose import Composed, compose
from peft_modal.errors import ConfigError
from peft_modal.files import remove_leftovers

_FREE = frozenset({"data.num_workers"})
"""Settings beside the trainer's that may change while a run is unfinished: no batch depends on them."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    root: Path
    overwrite: bool = False
    """Whether what a run has left there is to be deleted when the next one begins."""

    @property
    def adapter(self) -> Path:
        """The adapter file."""
        return self.root / "adapter.safetensors"

    @property
    def config(self) -> Path:
        """The complete configuration; `fit --config` on it repeats the run."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """All figures, flat; written last, so a run that has it is finished."""
        return self.root / "metrics.json"

    @property
    def reports(self) -> tuple[Path, Path]:
        """The report's page and its JSON twin; written before `metrics`, which ends the run."""
        return self.root / "report.html", self.root / "report.json"

    @property
    def data(self) -> Path:
        """Which files the data chose, where it chooses."""
        return self.root / "data.json"

    @property
    def checkpoints(self) -> Path:
        """Where the trainer's state lies."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """What a task draws while it trains, if it draws."""
        return self.root / "samples"

    @property
    def last_checkpoint(self) -> Path:
        """State at the end of the last complete epoch."""
        return self.checkpoints / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """State at the best validation, where `task.keep` asks for it."""
        return self.checkpoints / "best.ckpt"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.metrics.is_file()

    def refuse_finished(self) -> None:
        """Refuse to run where a run has come to its end.

        Raises:
            ConfigError: One has, and it is not to be overwritten.
        """
        if self.is_finished and not self.overwrite:
            raise ConfigError(f"--out: '{self.root}' holds a finished run; choose another folder, or pass --overwrite")

    def make_room(self) -> None:
        """Delete what is to be overwritten, and what a killed process left; nobody else may be using the folder."""
        if self.overwrite and self.config.is_file():
            for folder in (self.checkpoints, self.samples):
                shutil.rmtree(folder, ignore_errors=True)
            for path in (
                self.metrics, self.adapter, self.config, self.data, self.root / "metrics.csv", *self.reports
            ):  # fmt: skip
                path.unlink(missing_ok=True)
        for folder in (self.root, self.checkpoints):
            remove_leftovers(folder)


def refuse_other_settings(folder: RunFolder, composed: Composed) -> None:
    """Refuse to go on with a checkpoint of other settings; only the trainer's and the workers' number may change.

    Raises:
        ConfigError: Names every setting that differs from those the unfinished run was started with.
    """
    if folder.overwrite or not (folder.last_checkpoint.is_file() and folder.config.is_file()):
        return
    before = _flat({**compose(folder.config).to_dict(), "trainer": {}})
    now = _flat({**composed.to_dict(), "trainer": {}})
    changed = [key for key in sorted({*before, *now} - _FREE) if before.get(key) != now.get(key)]
    if changed:
        differences = ", ".join(f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in changed[:5])
        raise ConfigError(
            f"--out: '{folder.root}' holds an unfinished run with other settings: {differences}; "
            "choose another folder, or start it anew with --overwrite"
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:  # noqa: ANN401 — a parsed configuration
    if not isinstance(tree, Mapping):
        return {path: tree}
    parts = [_flat(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def open_folder(out: Path | None, *, config_name: str, overwrite: bool) -> RunFolder:
    """The folder to run in; a new one under `runs/` where none is named.

    Raises:
        ConfigError: It holds a finished run and `overwrite` is off, or is no folder.
    """
    if out is None:
        stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
        out = Path("runs") / (Path(config_name).stem or "run") / stamp
    folder = RunFolder(out, overwrite)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: '{out}' is a file; name a folder")
    folder.refuse_finished()
    return folder


def open_measure_folder(out: Path | None, *, adapter: Path, verb: str, overwrite: bool) -> RunFolder:
    """The folder for the figures of an adapter file; a new one under `runs/` where none is named.

    Raises:
        ConfigError: It holds a training run, or finished figures and `overwrite` is off, or is no folder.
    """
    if out is not None and (RunFolder(out).adapter.is_file() or RunFolder(out).config.is_file()):
        raise ConfigError(f"--out: '{out}' holds a training run; choose another folder")
    # Only a suffix of its own keeps a dot in the folder's name from being taken for one.
    name = f"{adapter.resolve().parent.name}-{verb}.yaml"
    return open_folder(out, config_name=name, overwrite=overwrite)
