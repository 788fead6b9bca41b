"""Classification where a sample may have several labels, or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities.data import dim_zero_cat

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL
from peft_modal.errors import DataError
from peft_modal.ranges import Share
from peft_modal.report import Collector
from peft_modal.tasks.base import Stage, Task
from peft_modal.tasks.multi_label_report import MultiLabelCollector


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean of the average precisions of those labels that occur; torchmetrics counts the others as 0.

    Args:
        num_labels: How many there are.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]  # as in torchmetrics itself
        """Of everything seen, ()."""
        with warnings.catch_warnings():
            # It tells which labels do not occur.
            warnings.simplefilter("ignore", UserWarning)
            precisions: Tensor = super().compute()
        occurs = dim_zero_cat(self.target).sum(0) > 0
        return precisions[occurs].mean() if bool(occurs.any()) else precisions.new_zeros(())


class MultiLabel(Task):
    """Binary cross-entropy of each label, and mean average precision over the labels (mAP).

    A label without a sample in a split counts for nothing there.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program.
        class_names: Names of the labels; supplied by the program.
        threshold: Probability from which on `predict` names a label.
        options: Arguments of `Task`.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/mean_average_precision", "max")
    share_metrics: ClassVar[frozenset[str]] = frozenset({"mean_average_precision"})
    gives_logits: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        threshold: Share = 0.5,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        super().__init__(backbone, adapter, head, **options)
        self.class_names = class_names
        self.threshold = threshold
        # `train` is taken on modules; of training data the loss is enough.
        self.metrics = nn.ModuleDict(
            {f"{stage}_metric": MeanAveragePrecision(len(class_names)) for stage in ("val", "test")}
        )

    def losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        """Binary cross-entropy of logits (B, C) and labels (B, C) in 0..1; a mixed sample has shares of two.

        Raises:
            DataError: The samples have one class each.
        """
        labels = batch["label"]
        if labels.shape != output.shape:
            raise DataError(
                f"task 'multi_label' needs labels of shape {tuple(output.shape)}, the data has {tuple(labels.shape)}; "
                "for one class per sample take task 'classification'"
            )
        target = labels.float()
        if OWN_SHARE in batch:
            target = torch.lerp(batch[PARTNER_LABEL].float(), target, batch[OWN_SHARE][:, None].float())
        return {"loss": functional.binary_cross_entropy_with_logits(output.float(), target)}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Tensor) -> None:
        """Average precisions."""
        if stage == "train":
            return
        metric: Any = self.metrics[f"{stage}_metric"]
        metric.update(output.detach().float().sigmoid(), batch["label"].int())
        self.log(f"{stage}/mean_average_precision", metric, on_step=False, on_epoch=True, batch_size=len(output))

    def predictions(self, output: Tensor) -> list[dict[str, Any]]:
        """For each sample its labels, likeliest first and separated by `;`, and the probability of every label."""
        rows = []
        for row in output.float().sigmoid():
            probabilities = dict(zip(self.class_names, (round(float(p), 6) for p in row), strict=True))
            named = sorted((name for name, p in probabilities.items() if p >= self.threshold), key=probabilities.get)  # type: ignore[arg-type]
            rows.append({"labels": ";".join(reversed(named)), "probabilities": probabilities})
        return rows

    def make_collector(self, *, seed: int) -> Collector:
        """Average precision of each label, and chosen samples."""
        return MultiLabelCollector(self.class_names, self.predictions, seed=seed)
