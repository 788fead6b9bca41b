"""One line of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and the command that mends it."""

    section: str
    name: str
    status: Status
    text: str = ""
    mend: str = ""
    """A command, or what to do; empty where all is well."""
