"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from peft_modal.errors import ConfigError, WriteError
from peft_modal.files import unwritable

_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is not there, until the block ends or the process dies, however it dies.

    The lock belongs to this process alone: worker processes that outlive it do not keep it. Of the processes of one
    distributed run the first holds it for all.

    Raises:
        ConfigError: Another process holds the folder; the sentence names it.
        WriteError: The folder cannot be made or written to.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    path = folder / _NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path)
    except OSError as error:
        raise WriteError(unwritable(path, error)) from error
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        # Before it is let go: whoever opens the file from here on makes a new one.
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A record lock: unlike that of `flock` it is not inherited by forked loader workers.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves open which of the two it is
            holder = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise ConfigError(
                f"--out: '{path.parent}' is in use by {holder or 'another process'}; "
                "wait until it is done, or choose another folder"
            ) from error
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
        os.close(handle)  # its holder has just finished and removed it
