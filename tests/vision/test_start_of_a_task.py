"""An adapter's start survives the backbone's: built from a configuration, it changes nothing and no branch is dead.

Some released code runs the network's initialisation over the finished model, adapters included, which undoes a zero
start or kills a branch whose factors are both zero.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.cases import CONFIGURATIONS, registry
from lightning.pytorch import Callback, Trainer

from peft_modal.api import build
from peft_modal.compose import compose
from peft_modal.running.fit import prepare

STEPS = 24
"""MoSA draws one of its experts in each, and LoCA moves its locations in some."""
ARGUMENTS = {"loca": {"num_frequencies": 12, "location_share": 1.0}}
"""Where the first configuration of the contract tests leaves something of the method out."""
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
_FIRST = {configuration.name: configuration for configuration in reversed(CONFIGURATIONS.values())}
_BUILT_OF_OTHERS = {"compose"}
METHODS = sorted(
    entry.name
    for entry in registry().entries("method")
    if entry.modality in {None, "", "vision"} and entry.name not in _BUILT_OF_OTHERS
)


class Largest(Callback):
    """Remembers the largest gradient that each trained tensor ever had."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_trained().items():
            if parameter.numel():
                found = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
                self.values[name] = max(self.values.get(name, 0.0), found)


def configuration(method: str) -> dict[str, Any]:
    arguments = ARGUMENTS.get(method, dict(_FIRST[method].arguments) if method in _FIRST else {})
    return {
        "seed": 0,
        "backbone": {"name": "vit", "model": "custom", "weights": "random", "sizes": SIZES},
        "method": {"name": method, **arguments},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "data": {"name": "patterns", "shots": 1, "val_per_class": 1, "test_per_class": 1, "batch_size": 12},
        "trainer": {"max_epochs": 1},
    }


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_nothing_and_no_branch_is_dead(method: str) -> None:
    composed = compose(configuration(method))
    data = composed.nodes["data"].build()
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    bare = composed.nodes["backbone"].build()
    bare.load_weights()
    task: Any = build(composed, data.class_names).task()
    prepare(task, data)

    task.eval()
    with torch.no_grad():
        expected, found = bare(batches[0]).tokens, task.backbone(batches[0]).tokens
    body = expected.shape[1]
    changed = found.shape[1] != body or not torch.allclose(found, expected, atol=1e-6)
    assert changed is not composed.nodes["method"].build().identity_at_init

    task.train()
    largest = Largest()
    trainer = Trainer(
        max_epochs=STEPS // len(batches), callbacks=[largest], limit_val_batches=0, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    dead = [name for name, value in largest.values.items() if value == 0.0]
    assert not dead, f"nothing reaches {', '.join(dead)}"
