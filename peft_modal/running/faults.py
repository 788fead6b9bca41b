"""Where errors of the operating system, of worker processes and of Lightning become sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from peft_modal.errors import ConfigError, DataError, PeftModalError, TrainingError
from peft_modal.files import unwritable

_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST,
}  # fmt: skip
"""What the operating system says when a place cannot be written to."""


@contextmanager
def in_sentences(folder: Path | None = None) -> Iterator[None]:
    """Let what goes wrong in a block end in one of our errors, where it is no bug.

    Args:
        folder: Where the block writes to.

    Raises:
        PeftModalError: With one sentence.
    """
    try:
        yield
    except PeftModalError as error:
        sentence = _from_worker(error)
        if sentence is None:
            raise
        raise type(error)(sentence) from error
    except OSError as error:
        if folder is None or error.errno not in _DISK:
            raise
        raise _sentence_for_file(error, folder) from error
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {_first_line(error)}") from error
    except (RuntimeError, MemoryError) as error:
        known = _sentence_for(error)
        if known is None:
            raise
        raise known from error


def _sentence_for_file(error: OSError, folder: Path) -> PeftModalError:
    path = Path(os.fsdecode(error.filename)) if error.filename else folder
    if path.absolute().is_relative_to(folder.absolute()):
        return unwritable(path, error)
    return DataError(f"'{path}' cannot be used: {error.strerror}; check that it is there and that you may open it")


def _sentence_for(error: RuntimeError | MemoryError) -> TrainingError | None:
    text = str(error)
    if isinstance(error, MemoryError) or any(phrase in text for phrase in _NO_MEMORY):
        return TrainingError("out of memory; lower data.batch_size, or use trainer.precision=bf16-mixed")
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "is killed by signal" in text):
        return TrainingError(
            f"a process that prepares batches died ({_first_line(error)}); free memory or lower data.num_workers, "
            "then repeat the command to go on from the last complete epoch"
        )
    return None


def _from_worker(error: PeftModalError) -> str | None:
    """The sentence of an error that a worker process has raised; torch wraps the worker's traceback around it."""
    text = str(error)
    if not text.startswith("Caught "):
        return None
    return text.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
