"""Checkpoints of a run: written whole or not at all, looked at before they are opened."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from peft_modal.errors import FileFormatError
from peft_modal.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there.

    Lightning's moves it in from the temporary folder, which copies where that is another file system, and so can leave
    half a file.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            TypeError: `storage_options` are given.
            WriteError: It cannot be written.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote storage; a run folder is local")
        # In memory first: from a full disk torch's own writer reports no more than "unexpected pos".
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())


def keep_last(folder: Path) -> ModelCheckpoint:
    """The callback that keeps the state at the end of the last complete epoch, `last.ckpt`."""
    return ModelCheckpoint(
        dirpath=folder, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )


def undamaged(path: Path) -> Path:
    """`path`, after the checksums of the checkpoint were looked at.

    Raises:
        FileFormatError: It is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise FileFormatError(damaged_checkpoint(path)) from error
    if damaged is not None:
        raise FileFormatError(damaged_checkpoint(path))
    return path


def damaged_checkpoint(path: Path) -> str:
    """The sentence for a checkpoint that cannot be read."""
    return f"'{path}' is damaged; delete it to start the run again"


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """What a checkpoint of ours holds of adapter and head, averaged where the run averages.

    Raises:
        FileFormatError: It is missing or damaged.
    """
    try:
        checkpoint = TorchCheckpointIO().load_checkpoint(undamaged(path), weights_only=True)
    except RuntimeError as error:
        raise FileFormatError(damaged_checkpoint(path)) from error
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return {**state, **checkpoint.get("average", {}).get("values", {})}
