"""Classification: one label per sample."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.data.counts import CountsClasses
from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeFloat, PositiveInt, Share
from peft_modal.report import Collector
from peft_modal.tasks.base import Stage, Task
from peft_modal.tasks.classification_report import ClassificationCollector
from peft_modal.tasks.relevance import relevance
from peft_modal.tasks.voting import voting_metrics


class Classification(Task):
    """Cross-entropy, overall accuracy and mean accuracy over classes.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program.
        class_names: Names of the classes in label order; supplied by the program.
        label_smoothing: Share of each target that is spread over all classes.
        votes: Views of each test sample, made by the data, whose logits are averaged; what these get right is
            `test/accuracy_voted`, beside the figures of the single view.
        vote_repeats: How often the vote is held, with other views each time. `test/accuracy_voted` is the mean;
            `test/accuracy_voted_best` the best of them, which is chosen on test data and what some papers report.
        class_weights: Factor of each sample's training loss by its class, for unbalanced data: `none`, `balanced`
            (n / (classes * n_class), from the counts of the training split), or one number per class. The batch's mean
            divides by its size, not by the sum of the weights. Losses on validation and test data are unweighted.
        options: Arguments of `Task`.

    Raises:
        ConfigError: There are not as many class weights as classes.
        DataError: There are fewer than two classes.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/accuracy", "max")
    share_metrics: ClassVar[frozenset[str]] = frozenset(
        {"accuracy", "mean_class_accuracy", "accuracy_voted", "accuracy_voted_best"}
    )
    gives_logits: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        label_smoothing: Share = 0.0,
        votes: PositiveInt = 1,
        vote_repeats: PositiveInt = 1,
        class_weights: Literal["none", "balanced"] | list[NonNegativeFloat] = "none",
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        super().__init__(backbone, adapter, head, **options)
        self.class_names = class_names
        self.label_smoothing = label_smoothing
        self.votes = votes
        self.vote_repeats = vote_repeats
        self.class_weights = class_weights
        count = len(class_names)
        if count < 2:
            raise DataError(
                f"task 'classification' needs two classes or more, and the data has one class: {', '.join(class_names)}"
            )
        weights = None
        if not isinstance(class_weights, str):
            if len(class_weights) != count or not any(class_weights):
                raise ConfigError(
                    f"task.class_weights: expected one number for each of the {count} classes "
                    f"({', '.join(class_names)}), not all 0, got {class_weights}"
                )
            weights = torch.tensor(class_weights)
        self.register_buffer("loss_weights", weights, persistent=False)
        self.loss_weights: Tensor | None
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "mean_class_accuracy": MulticlassAccuracy(count, average="macro"),
            }
        )
        self.voted = voting_metrics(votes, vote_repeats)
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{_KEYS[stage]}/") for stage in _KEYS})

    def before_fit(self, data: LightningDataModule) -> None:
        """Balance the class weights, where that is asked for.

        Raises:
            ConfigError: The data does not tell how many samples each class has, or a class has none.
        """
        if self.class_weights != "balanced":
            return
        if not isinstance(data, CountsClasses):
            raise ConfigError(
                f"task.class_weights: 'balanced' needs data that counts its classes, and {type(data).__name__} has no "
                "class_counts(); give one number per class"
            )
        counts = torch.tensor(data.class_counts(), dtype=torch.float64)
        if missing := [name for name, count in zip(self.class_names, counts, strict=True) if count == 0]:
            raise ConfigError(f"task.class_weights: 'balanced', but {', '.join(missing)} has no training sample")
        self.loss_weights = (counts.sum() / (len(counts) * counts)).float()

    def losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of logits (B, C) and labels (B,), weighted by class where that is asked for.

        Raises:
            ConfigError: The weights shall be balanced, and `before_fit` was not called.
        """
        if self.class_weights == "balanced" and self.loss_weights is None:
            raise ConfigError("task.class_weights: 'balanced' needs the counts of the data; call task.before_fit(data)")
        return {"loss": self._weighted(batch, output, self.loss_weights)}

    def evaluation_losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of logits (B, C) and labels (B,)."""
        return {"loss": self._weighted(batch, output, None)}

    def _weighted(self, batch: Mapping[str, Any], output: Tensor, weights: Tensor | None) -> Tensor:
        """Mean over samples; one that was mixed of two has both labels, each with its share."""
        if OWN_SHARE not in batch:
            return self._cross_entropy(output, batch["label"], weights).mean()
        own = batch[OWN_SHARE]
        other = self._cross_entropy(output, batch[PARTNER_LABEL], weights)
        return (own * self._cross_entropy(output, batch["label"], weights) + (1 - own) * other).mean()

    def _cross_entropy(self, output: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        # Not the `weight` of `cross_entropy`: its mean divides by the batch's weights, so that a batch of one class
        # would ignore them, and accumulated batches would count differently from one large batch.
        each = functional.cross_entropy(output.float(), labels, label_smoothing=self.label_smoothing, reduction="none")
        return each if weights is None else weights[labels] * each

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Tensor) -> None:
        """Accuracies."""
        metrics = self.metrics[f"{stage}_metrics"]
        metrics.update(output.detach(), batch["label"])  # type: ignore[operator]
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(output))  # type: ignore[arg-type]
        if stage == "test" and len(self.voted):
            self._vote(batch)

    def _vote(self, batch: Mapping[str, Any]) -> None:
        """Hold the votes over the views that the data gives of each sample.

        Raises:
            ConfigError: The data makes no views.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "vote"):
            raise ConfigError(f"task.votes: {type(datamodule).__name__} makes no views to vote over; set votes to 1")
        for repeat in range(self.vote_repeats):
            views = range(repeat * self.votes, (repeat + 1) * self.votes)
            logits = torch.stack([self(datamodule.vote(batch, index)) for index in views]).mean(0)
            for metric in self.voted.values():
                metric.update(repeat, logits, batch["label"])  # type: ignore[operator]
        for name, metric in self.voted.items():
            self.log(f"test/{name}", metric, on_step=False, on_epoch=True, batch_size=len(batch["label"]))  # type: ignore[arg-type]

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

    def make_collector(self, *, seed: int) -> Collector:
        """Confusion matrix, accuracy of each class, and chosen samples."""
        key = self.backbone.explained_input
        explain = None if key is None else functools.partial(self._relevance, key)
        return ClassificationCollector(self.class_names, self.predictions, seed=seed, explain=explain)

    def _relevance(self, key: str, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """What speaks for the class that one sample (without the batch axis) is taken for, by place of its input."""
        batch = {name: value[None].to(self.device) for name, value in sample.items() if isinstance(value, Tensor)}
        was_training = self.training
        self.eval()
        found = relevance(lambda inputs: self(inputs).float().amax(-1), batch, key)
        self.train(was_training)
        return {"relevance": found[0].cpu()}


# `train` is taken on modules.
_KEYS = {"train_metrics": "train", "val_metrics": "val", "test_metrics": "test"}
