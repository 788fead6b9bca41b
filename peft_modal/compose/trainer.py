"""The `trainer` node: arguments of Lightning's Trainer, whose objects keep `class_path` and `init_args`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_modal.compose.arguments import ArgumentChecker, restrict_imports, typed_arguments
from peft_modal.compose.describe import show
from peft_modal.registry import Registry, default_registry


def check_trainer(values: object, checker: ArgumentChecker) -> dict[str, Any]:
    """Check the `trainer` node; returned complete, in plain types."""
    from lightning.pytorch import Trainer

    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        checker.add("trainer", f"expected a mapping of Trainer arguments, got {show(values)}.")
        return {}
    return checker.check(Trainer, values, path="trainer", owner="Lightning's Trainer")


def build_trainer_kwargs(trainer: Mapping[str, Any], *, registry: Registry | None = None) -> dict[str, Any]:
    """Arguments for `lightning.pytorch.Trainer`, with callbacks, loggers and the like created.

    Args:
        trainer: The `trainer` of a composed configuration.
        registry: Whose plugins' classes may be named; None for everything installed.
    """
    from lightning.pytorch import Trainer

    restrict_imports(registry or default_registry())
    return typed_arguments(Trainer, trainer)
