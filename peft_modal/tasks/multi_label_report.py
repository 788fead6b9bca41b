"""What a task of several labels adds to a report: average precision of each label, and samples with predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from peft_modal.report import Best, Column, Fact, Gallery, Kept, Section, Table, Tile, draw, element

_SAMPLES: Final = 6
_FOLDED_FROM: Final = 16
_THRESHOLDS: Final = 400
"""Probabilities that precision and recall are counted at; exact ones would need every prediction."""


class MultiLabelCollector:
    """Counts what is found at some thresholds, and keeps a seeded draw of samples, and those with the worst mistakes.

    Args:
        class_names: Names of the labels.
        predictions: A task's rows for an output.
        seed: Of the draw.
    """

    def __init__(
        self, class_names: Sequence[str], predictions: Callable[[Tensor], list[dict[str, Any]]], *, seed: int
    ) -> None:
        self.class_names = tuple(class_names)
        self.predictions = predictions
        self.seed = seed
        count = len(self.class_names)
        self.precision = MultilabelAveragePrecision(count, average="none", thresholds=_THRESHOLDS)
        self.with_label = torch.zeros(count, dtype=torch.int64)
        self._count = 0
        self._drawn = Best(_SAMPLES)
        self._worst = Best(_SAMPLES)

    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Take in logits (B, C) and labels (B, C)."""
        probabilities = output.detach().float().sigmoid().cpu()
        labels = batch["label"].detach().cpu().int()
        self.precision.update(probabilities, labels)
        self.with_label += labels.sum(0)
        mistakes = (probabilities - labels).abs().max(1)
        for i, (value, label) in enumerate(zip(mistakes.values.tolist(), mistakes.indices.tolist(), strict=True)):
            index = self._count + i
            for best, worth, group in (
                (self._worst, value, label), (self._drawn, draw(self.seed, index), index)
            ):  # fmt: skip
                if best.wants(worth, group):
                    (prediction,) = self.predictions(output[i : i + 1].detach())
                    best.add(Kept(index, element(batch, i), prediction, worth), group)
        self._count += len(labels)

    def sections(self) -> tuple[Section, ...]:
        """Samples, then every label."""
        if not self._count:
            return ()
        galleries = (
            Gallery(tuple(self._tile(kept) for kept in self._worst.samples()), "Largest mistakes"),
            Gallery(tuple(self._tile(kept) for kept in self._drawn.samples()), "A seeded draw"),
        )
        lead = f"A fixed choice among {self._count:,} samples: for each label the largest mistake, and a seeded draw."
        return (Section("samples", "Samples", galleries, lead), self._labels())

    def _tile(self, kept: Kept) -> Tile:
        assert kept.prediction is not None
        truth = [name for name, has in zip(self.class_names, kept.sample["label"].tolist(), strict=True) if has]
        facts = (Fact("true", "; ".join(truth) or "none"), Fact("sample", kept.index, "count"))
        return Tile(str(kept.prediction["labels"]).replace(";", "; ") or "none", kept.sample, kept.prediction, facts)

    def _labels(self) -> Section:
        precisions = self.precision.compute().tolist()
        rows = [
            (name, count, precision if count else None)
            for name, count, precision in zip(self.class_names, self.with_label.tolist(), precisions, strict=True)
        ]
        rows.sort(key=lambda row: (row[2] is None, row[2] or 0.0))
        columns = (Column("Label"), Column("Samples", "count"), Column("Average precision", "bar"))
        table = Table(columns, tuple(rows), "Average precision of each label", folded=len(rows) >= _FOLDED_FROM)
        return Section("labels", "Labels", (table,), f"Counted at {_THRESHOLDS} thresholds.")
