"""Making the trainer of a run: the configuration's own objects, and what every run needs."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger

from peft_modal.compose import Composed, build_trainer_kwargs
from peft_modal.running.callbacks import Cost, EpochLines, History, StepSeeding
from peft_modal.running.folder import RunFolder

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
    r".*Experiment logs directory .* exists and is not empty.*",
    # The schedule's state is restored before the optimiser has stepped: https://github.com/pytorch/pytorch/issues/119168
    r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
)


def make_trainer(composed: Composed, folder: RunFolder | None, *, cost: Cost | None = None) -> Trainer:
    """The trainer of a run; without a folder it writes nothing."""
    quieten()
    arguments: dict[str, Any] = build_trainer_kwargs(composed.trainer)
    callbacks = list(arguments.get("callbacks") or [])
    # The trainer's own defaults would write into the working directory.
    arguments["enable_model_summary"] = False
    arguments["num_sanity_val_steps"] = 0
    if sys.stderr.isatty() and arguments.get("enable_progress_bar") is not False:
        callbacks.append(RichProgressBar())
    else:
        arguments["enable_progress_bar"] = False
        callbacks.append(EpochLines())
    callbacks += [StepSeeding(composed.seed), *([cost] if cost is not None else [])]
    if folder is None:
        arguments.update(logger=False, enable_checkpointing=False)
    else:
        arguments["default_root_dir"] = str(folder.root)
        arguments["enable_checkpointing"] = True
        if arguments.get("logger") in {None, True}:
            arguments["logger"] = []
        elif arguments["logger"] is False or not isinstance(arguments["logger"], list):
            arguments["logger"] = [arguments["logger"]] if arguments["logger"] else []
        table = CSVLogger(str(folder.root), name="", version="")
        arguments["logger"] = [table, *arguments["logger"]]
        callbacks.append(History(table, folder.root / "metrics.csv"))
        callbacks.append(
            ModelCheckpoint(
                dirpath=folder.checkpoints,
                filename="last",
                save_top_k=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        )
    arguments["callbacks"] = callbacks
    return Trainer(**arguments)


def quieten() -> None:
    """Keep Lightning's tips and known harmless warnings out of what the user reads."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _QUIET:
        warnings.filterwarnings("ignore", message=pattern)
