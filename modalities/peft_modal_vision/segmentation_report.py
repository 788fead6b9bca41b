"""What segmentation adds to a report: figures of each class, confused pairs, and pictures with both masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from peft_modal.report import Best, Column, Fact, Gallery, Kept, Row, Section, Table, Tile, draw, element
from peft_modal.tasks.confusion import confused_pairs

FOUND: Final = "found"
"""The key of the predicted mask in a sample that is drawn."""
_SAMPLES: Final = 6


class SegmentationCollector:
    """Counts pairs of true and predicted class over pixels, and keeps a few pictures.

    Kept are the pictures with the smallest share of right pixels, and a seeded draw.

    Args:
        class_names: In label order.
        labels: The predicted classes (B, H, W) of a batch and the task's output, as large as its masks.
        ignored: The label of pixels that do not count.
        seed: Of the draw.
    """

    def __init__(
        self, class_names: Sequence[str], labels: Callable[[Mapping[str, Any], Any], Tensor], *, ignored: int, seed: int
    ) -> None:
        self.class_names = tuple(class_names)
        self.labels = labels
        self.ignored = ignored
        self.seed = seed
        self.confusion = MulticlassConfusionMatrix(len(self.class_names), ignore_index=ignored)
        self._count = 0
        self._drawn = Best(_SAMPLES)
        self._worst = Best(_SAMPLES)

    def add(self, batch: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401 — the task's
        """Take in a batch with its masks (B, H, W), and the output for it."""
        found, mask = self.labels(batch, output).detach().cpu(), batch["mask"].detach().cpu()
        self.confusion.update(found, mask)
        for i, share in enumerate(self._right(found, mask)):
            index = self._count + i
            for best, value in ((self._worst, -share), (self._drawn, draw(self.seed, index))):
                if best.wants(value, index):
                    best.add(Kept(index, {**element(batch, i), FOUND: found[i].clone()}, None, value), index)
        self._count += len(found)

    def _right(self, found: Tensor, mask: Tensor) -> list[float]:
        """Share of right pixels of each picture (B, H, W)."""
        counted = mask != self.ignored
        right = ((found == mask) & counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        return right.tolist()

    def sections(self) -> tuple[Section, ...]:
        """Pictures, then figures of each class."""
        if not self._count:
            return ()
        galleries = tuple(
            Gallery(tuple(self._tile(kept) for kept in best.samples()), title)
            for best, title in ((self._worst, "Fewest right pixels"), (self._drawn, "A seeded draw"))
        )
        lead = (
            f"A fixed choice among {self._count:,} pictures. Above: the picture, its true mask. Below: the mask that "
            "was found, and the wrong pixels; one colour for each class."
        )
        return Section("samples", "Samples", galleries, lead), self._classes()

    def _tile(self, kept: Kept) -> Tile:
        mask, found = kept.sample["mask"], kept.sample[FOUND]
        (share,) = self._right(found[None], mask[None])
        there = [self.class_names[label] for label in mask[mask != self.ignored].unique().tolist()]
        facts = (Fact("true", ", ".join(there)), Fact("sample", kept.index, "count"))
        return Tile(f"{100 * share:.1f} % of pixels right", kept.sample, None, facts)

    def _classes(self) -> Section:
        counts: list[list[int]] = self.confusion.compute().tolist()
        names = self.class_names
        total = sum(map(sum, counts))
        rows = []
        for i, name in enumerate(names):
            true, taken, right = sum(counts[i]), sum(row[i] for row in counts), counts[i][i]
            union = true + taken - right
            rows.append((name, true / max(total, 1), right / true if true else None, right / union if union else None))
        rows.sort(key=lambda row: (row[3] is None, row[3] or 0.0))
        columns = (
            Column("Class"), Column("Of all pixels", "share"), Column("Accuracy", "share"),
            Column("Intersection over union", "bar"),
        )  # fmt: skip
        tables = [Table(columns, tuple(rows), "Figures of each class")]
        if confused := tuple((names[i], names[j], share) for i, j, _, share in confused_pairs(counts)):
            heads = (Column("True"), Column("Predicted"), Column("Of its pixels", "share"))
            tables.insert(0, Table(heads, confused, "Most confused pairs"))
        right = sum(counts[i][i] for i in range(len(names)))
        lead = f"{right:,} of {total:,} pixels are right."
        return Section("classes", "Classes", (Row(tuple(tables)),), lead)
