"""A small convolutional regression whose entries of smallest magnitude are trained by a task of the product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from plain_backbone import PlainBackbone
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typing_extensions import override

from golden_runners.golden_case import GoldenCase
from peft_modal.anatomy import AnatomyBuilder
from peft_modal.attach import Adapter
from peft_modal.methods.sara import SaRA, SaRARun
from peft_modal.tasks.base import Task


def sara(case: GoldenCase) -> None:
    """Masks, task and rank gradients, and the weights after optimiser steps with rank loss and re-selection."""
    backbone = _backbone(case)
    steps, again = case.setting("steps"), case.setting("progressive_iter")
    method = SaRA(
        threshold=case.setting("threshold"),
        rank_weight=case.setting("lambda_rank"),
        reselect_share=None if again is None or not 0 <= again < steps else again / steps,
    )
    adapter = method.attach(backbone)
    run = adapter.get_submodule("training_only.sara")
    assert isinstance(run, SaRARun)
    _masks(case, "mask", run)
    case.require("selected", sum(entries.values.numel() for entries in run.tuned.values()))
    case.require("rank_candidates", run.matrices)
    sequence = case.setting("rank_sequence", None) or [None] * steps
    run.pick = lambda step: sequence[step]
    if sequence[0] is not None:
        value, gradient = run.rank_loss(sequence[0])
        case.compare("out.rank_loss", value)
        case.compare_gradient(f"rank.{sequence[0]}", gradient)
    _fit(case, backbone, adapter, _Watch(case, run), steps)


class _Watch(pl.Callback):
    """Compares what a run shows on its way."""

    def __init__(self, case: GoldenCase, run: SaRARun) -> None:
        self.case = case
        self.run = run

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 0:
            self.case.compare("out.loss", loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            for name, entries in self.run.tuned.items():
                self.case.compare_gradient(name, entries.values.grad)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, entries in self.run.tuned.items():
            self.case.compare(f"out.after{trainer.global_step}.{name}", entries.tuned()[1])

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _masks(self.case, "mask2", self.run)
        trained = sum(entries.values.numel() for entries in self.run.tuned.values())
        self.case.require("selected_after_reselection", trained)


class _Network(nn.Module):
    """Convolution, GELU, mean over the plane, two linears with GELU between."""

    def __init__(self, case: GoldenCase) -> None:
        super().__init__()
        out, channels, *kernel = case.shape("param.conv.weight")
        hidden, _ = case.shape("param.fc1.weight")
        self.conv = nn.Conv2d(channels, out, tuple(kernel), padding=tuple(side // 2 for side in kernel))
        self.fc1 = nn.Linear(out, hidden)
        self.fc2 = nn.Linear(hidden, case.shape("param.fc2.weight")[0])

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, H, W) to (B, out)."""
        return self.fc2(functional.gelu(self.fc1(functional.gelu(self.conv(x)).mean((2, 3)))))


class _Regression(Task):
    """Mean squared error of the features."""

    @override
    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return self.backbone(batch).tokens

    @override
    def losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.mse_loss(output, batch["target"])}

    @override
    def update_metrics(self, stage: str, batch: Mapping[str, Any], output: Tensor) -> None:
        """None."""


def _backbone(case: GoldenCase) -> PlainBackbone:
    network = _Network(case)
    case.fill(network, lambda name: f"param.{name}")
    # Prose about the network and the order of a step, which the numbers check.
    for text in ("net", "order", "note", "rank_candidates_rule"):
        case.setting(text, None)

    def describe(b: AnatomyBuilder) -> None:
        for role in ("conv", "fc1", "fc2"):
            b.op(role, role)

    return PlainBackbone(network, describe)


def _masks(case: GoldenCase, prefix: str, run: SaRARun) -> None:
    for name, entries in run.tuned.items():
        shape = case.shape(f"param.{name}")
        mask = torch.zeros(shape, dtype=torch.uint8)
        mask.view(-1)[entries.index.long()] = 1
        case.compare(f"{prefix}.{name}", mask)


def _fit(case: GoldenCase, backbone: PlainBackbone, adapter: Adapter, watch: _Watch, steps: int) -> None:
    task = _Regression(
        backbone, adapter, nn.Identity(), lr=case.setting("lr"), weight_decay=case.setting("weight_decay"),
        warmup_share=0.0, min_lr_share=1.0, clip_norm=case.setting("grad_clip"),
    )  # fmt: skip
    batch = {"x": case.take("in.x"), "target": case.take("in.target")}
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader([batch] * steps, batch_size=None))
    for group in trainer.optimizers[0].param_groups:
        case.require("betas", list(group["betas"]))
        case.require("eps", group["eps"])
