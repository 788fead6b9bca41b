"""Making the trainer of a run: the configuration's own objects, and what every run needs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.io import CheckpointIO

from peft_modal.compose import Composed, build_trainer_kwargs
from peft_modal.errors import ConfigError
from peft_modal.running.callbacks import EpochLines, StepSeeding
from peft_modal.running.checkpoints import AtomicCheckpointIO, keep_last
from peft_modal.running.folder import RunFolder
from peft_modal.running.history import Table

_QUIET = (
    # The frozen backbone is meant to be in eval mode: https://github.com/Lightning-AI/pytorch-lightning/issues/20105
    r".*module\(s\) in eval mode.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    # Small data on few cores is faster without workers: https://github.com/Lightning-AI/pytorch-lightning/issues/10182
    r".*does not have many workers.*",
    # Short epochs are normal here: https://github.com/Lightning-AI/pytorch-lightning/issues/10644
    r".*smaller than the logging interval.*",
    # A resumed run finds its own folder: https://github.com/Lightning-AI/pytorch-lightning/issues/17850
    r".*Checkpoint directory .* exists and is not empty.*",
    # The schedule's state is restored before the optimiser has stepped: https://github.com/pytorch/pytorch/issues/119168
    r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
)


def make_trainer(
    composed: Composed, folder: RunFolder | None, *, callbacks: Sequence[Callback] = (), table: Table | None = None
) -> Trainer:
    """The trainer of a run; without a folder it writes nothing.

    Args:
        composed: The configuration.
        folder: Where to write.
        callbacks: What the run adds to the configuration's own.
        table: Where figures over time go.

    Raises:
        ConfigError: The trainer cannot be made, for instance because there is no such device.
    """
    quieten()
    arguments: dict[str, Any] = build_trainer_kwargs(composed.trainer)
    own = list(arguments.get("callbacks") or [])
    # The trainer's own defaults would write into the working directory.
    arguments["enable_model_summary"] = False
    arguments["num_sanity_val_steps"] = 0
    if sys.stderr.isatty() and arguments.get("enable_progress_bar") is not False:
        own.append(RichProgressBar())
    else:
        arguments["enable_progress_bar"] = False
        own.append(EpochLines())
    own += [StepSeeding(composed.seed), *callbacks]
    if folder is None:
        arguments.update(logger=False, enable_checkpointing=False)
    else:
        arguments["default_root_dir"] = str(folder.root)
        arguments["enable_checkpointing"] = True
        arguments["logger"] = [*([table] if table is not None else []), *_loggers(arguments.get("logger"))]
        own.append(keep_last(folder.checkpoints))
        plugins = _as_list(arguments.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        arguments["plugins"] = plugins
    arguments["callbacks"] = own
    try:
        return Trainer(**arguments)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        # Which of them Lightning raises depends on the argument.
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def _loggers(value: Any) -> list[Any]:  # noqa: ANN401 — what the configuration holds
    return [] if value is None or isinstance(value, bool) else _as_list(value)


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401 — what the configuration holds
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def quieten() -> None:
    """Keep Lightning's tips and known harmless warnings out of what the user reads."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _QUIET:
        warnings.filterwarnings("ignore", message=pattern)
