"""What a data module can tell of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class CountsClasses(Protocol):
    """A data module that knows how many training samples each class has; `task.class_weights: balanced` asks it."""

    def class_counts(self) -> Sequence[int]:
        """Training samples of each class in label order; called after `setup("fit")`."""
