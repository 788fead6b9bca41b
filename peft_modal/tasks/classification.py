"""Classification: one label per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.tasks.base import ClipScope, Stage, Task


class Classification(Task):
    """Cross-entropy, overall accuracy and mean accuracy over classes.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program.
        class_names: Names of the classes in label order; supplied by the program.
        lr: Learning rate of AdamW.
        weight_decay: Decay of tensors with two and more axes.
        warmup_share: Share of the run's steps with a growing learning rate.
        min_lr_share: Share of the learning rate that the cosine ends at.
        clip_norm: Largest gradient norm over the trained tensors, or None.
        clip_scope: Whose gradients count for that norm; see `Task`.
        label_smoothing: Share of each target that is spread over all classes.
        votes: Views whose logits are averaged for each test sample; the data makes them.
    """

    selection = ("val/accuracy", "max")

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        warmup_share: float = 0.1,
        min_lr_share: float = 0.002,
        clip_norm: float | None = 10.0,
        clip_scope: ClipScope = "trainable",
        label_smoothing: float = 0.0,
        votes: int = 1,
    ) -> None:
        super().__init__(
            backbone,
            adapter,
            head,
            lr=lr,
            weight_decay=weight_decay,
            warmup_share=warmup_share,
            min_lr_share=min_lr_share,
            clip_norm=clip_norm,
            clip_scope=clip_scope,
        )
        if votes < 1:
            raise ConfigError(f"task.votes: {votes} is below 1")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"task.label_smoothing: {label_smoothing} is outside 0..1")
        self.class_names = class_names
        self.label_smoothing = label_smoothing
        self.votes = votes
        count = len(class_names)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "mean_class_accuracy": MulticlassAccuracy(count, average="macro"),
            }
        )
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{_KEYS[stage]}/") for stage in _KEYS})
        self.confusion = MulticlassConfusionMatrix(count)

    def losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of logits (B, C) and labels (B,)."""
        return {"loss": functional.cross_entropy(output.float(), batch["label"], label_smoothing=self.label_smoothing)}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Tensor) -> None:
        """Accuracies; on test data the confusion matrix too."""
        metrics = self.metrics[f"{stage}_metrics"]
        metrics.update(output.detach(), batch["label"])  # type: ignore[operator]
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(output))  # type: ignore[arg-type]
        if stage == "test":
            self.confusion.update(output.detach(), batch["label"])

    def predictions(self, output: Tensor) -> list[dict[str, Any]]:
        """For each sample the likeliest class and the probability of every class."""
        probabilities = output.float().softmax(-1)
        return [
            {
                "class": self.class_names[int(row.argmax())],
                "probabilities": dict(zip(self.class_names, (round(float(p), 6) for p in row), strict=True)),
            }
            for row in probabilities
        ]

    def evaluate(self, stage: Stage, batch: Mapping[str, Any]) -> Tensor:
        """Logits; on test data averaged over the `votes` views that the data gives of each sample.

        Raises:
            ConfigError: The data makes no views.
        """
        if self.votes == 1 or stage != "test":
            return self(batch)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "vote"):
            raise ConfigError(f"task.votes: {type(datamodule).__name__} makes no views to vote over; set votes to 1")
        return torch.stack([self(datamodule.vote(batch, index)) for index in range(self.votes)]).mean(0)


# `train` is taken on modules.
_KEYS = {"train_metrics": "train", "val_metrics": "val", "test_metrics": "test"}
