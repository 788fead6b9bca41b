"""Where errors of the operating system, of worker processes and of Lightning become sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from peft_modal.errors import ConfigError, DataError, PeftModalError, TrainingError, WriteError
from peft_modal.files import unwritable

_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")
_FILE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST,
}  # fmt: skip
"""What the operating system says of a place that cannot be used; other errors are bugs."""


@contextmanager
def in_sentences(folder: Path | None = None) -> Iterator[None]:
    """Let what goes wrong in a block end in one of our errors, where it is no bug.

    Args:
        folder: Where the block writes to.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        known = _known(error, folder)
        if known is None:
            raise
        raise known from error


def _known(error: Exception, folder: Path | None) -> PeftModalError | None:
    match error:
        case PeftModalError():
            return _of_worker(error)
        case OSError() if error.errno in _FILE_ERRORS:
            return _of_file(error, folder)
        case MisconfigurationException():
            return ConfigError(f"trainer: {_first_line(error)}")
        case RuntimeError() | MemoryError():
            return _of_run(error)
    return None


def _of_worker(error: PeftModalError) -> PeftModalError | None:
    """What a worker process has raised, without its traceback, which torch wraps around it."""
    text = str(error)
    if not text.startswith("Caught "):
        return None
    return type(error)(text.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip())


def _of_file(error: OSError, folder: Path | None) -> PeftModalError | None:
    path = Path(os.fsdecode(error.filename)) if error.filename else folder
    if path is None:
        return None
    if folder is not None and path.absolute().is_relative_to(folder.absolute()):
        return WriteError(unwritable(path, error))
    return DataError(f"'{path}' cannot be used: {error.strerror}; check that it is there and that you may open it")


def _of_run(error: RuntimeError | MemoryError) -> PeftModalError | None:
    text = str(error)
    if isinstance(error, MemoryError) or any(phrase in text for phrase in _NO_MEMORY):
        return TrainingError(
            "out of memory; lower data.batch_size or the sizes that were chosen, or use trainer.precision=bf16-mixed"
        )
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "is killed by signal" in text):
        return TrainingError(
            f"a process that prepares batches died ({_first_line(error)}); free memory or lower data.num_workers, "
            "then repeat the command: an unfinished run goes on from its last complete epoch"
        )
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
