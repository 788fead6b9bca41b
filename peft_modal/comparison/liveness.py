"""Telling at once, on the machine it ran on, that a worker has ended."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from pathlib import Path
from types import TracebackType


class Badge:
    """A worker's name, and a lock on a file of that name for as long as the worker lives.

    The kernel lets go of the lock however the process ends, so that its runs need not wait for the grace period.

    Args:
        out: The comparison's folder.
    """

    def __init__(self, out: Path) -> None:
        self.name = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._folder = out / "workers"
        self._file = -1

    def __enter__(self) -> Badge:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._folder / self.name, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        (self._folder / self.name).unlink(missing_ok=True)
        os.close(self._file)

    def is_dead(self, worker: str) -> bool:
        """Whether a worker of this machine has ended; of others nothing is known."""
        path = self._folder / worker
        if not worker.startswith(f"{_host()}-") or Path(worker).name != worker or not path.is_file():
            return False
        file = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", socket.gethostname())
