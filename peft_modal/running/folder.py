"""The folder of one run: what lies where, and whether the run is new, unfinished or done."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from peft_modal.errors import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    root: Path

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
    def checkpoints(self) -> Path:
        """Where the trainer's state lies."""
        return self.root / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """State at the end of the last complete epoch."""
        return self.checkpoints / "last.ckpt"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.metrics.is_file()


def open_folder(out: Path | None, *, config_name: str, overwrite: bool) -> RunFolder:
    """The folder to run in; a new one under `runs/` where none is named.

    Raises:
        ConfigError: It holds a finished run and `overwrite` is off, or is no folder.
    """
    if out is None:
        stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
        out = Path("runs") / (Path(config_name).stem or "run") / stamp
    folder = RunFolder(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: '{out}' is a file; name a folder")
    if folder.is_finished and not overwrite:
        raise ConfigError(f"--out: '{out}' holds a finished run; choose another folder, or pass --overwrite")
    if overwrite and folder.config.is_file():
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        for path in (folder.metrics, folder.adapter, folder.config, folder.root / "metrics.csv"):
            path.unlink(missing_ok=True)
    return folder
