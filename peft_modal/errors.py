"""Errors that end in one clear sentence: what is wrong, where, and what to do.

Each subclass also inherits the built-in error that a caller would expect. The command line prints the sentence and
exits with 2; a traceback is shown only with `PEFT_MODAL_DEBUG=1`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftModalError(Exception):
    """Base of every error that peft_modal raises on purpose."""


class ConfigError(PeftModalError, ValueError):
    """A configuration cannot be used; `problems` lists every mistake found."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        return type(self), self.problems


class RegistryError(PeftModalError, LookupError):
    """A name is unknown, registered twice, or its plugin cannot be loaded."""


class MissingExtraError(PeftModalError, ImportError):
    """An optional package is not installed."""


class SelectionError(PeftModalError, ValueError):
    """A selector matches nothing, or something the method cannot act on."""


class AttachError(PeftModalError, ValueError):
    """A method cannot work on this backbone."""


class MergeError(PeftModalError, RuntimeError):
    """An adapter cannot be folded into plain weights."""


class ContextError(PeftModalError, RuntimeError):
    """A per-forward value is read when it is missing or no longer the right one."""


class FileFormatError(PeftModalError, ValueError):
    """A file is corrupt, of another format, or of a newer version."""


class WriteError(PeftModalError, OSError):
    """A file cannot be written: the disk is full, the place is not writable, and the like."""


class BackboneMismatchError(PeftModalError, ValueError):
    """An adapter was made for another backbone."""


class WeightsError(PeftModalError, ValueError):
    """Backbone weights are missing, incomplete or of another architecture."""


class DataError(PeftModalError, ValueError):
    """Data on disk is missing, empty, or cannot be read."""


class TrainingError(PeftModalError, RuntimeError):
    """A run cannot go on, for instance because the loss is not finite."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """A ready half sentence with the closest known names, or with all of them when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "known: " + (", ".join(known) if known else "none") + "."
