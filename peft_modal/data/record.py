"""What a data module leaves of itself in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class KeepsRecord(Protocol):
    """A data module that chooses files: `data.json` in a run's folder says which."""

    def record(self) -> Mapping[str, Any]:
        """What was chosen, as JSON takes it; called after `setup`."""
