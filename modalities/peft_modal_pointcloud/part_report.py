"""What part segmentation adds to a report: figures of categories and parts, and clouds with true and found parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from peft_modal.report import Best, Column, Fact, Gallery, Kept, Row, Section, Table, Tile, draw, element
from peft_modal.tasks.confusion import confused_pairs
from peft_modal_heads.parts import PartOutput, PartTable
from peft_modal_pointcloud.part_metrics import GroupMean, shape_ious
from peft_modal_pointcloud.render import FIRST_PART, LEGEND, SHOWN, STRONG

_SAMPLES: Final = 6
_FOUND: Final = "found"
_IOU: Final = "iou"
_FOLDED_FROM: Final = 16
"""Rows of the table of parts from which on it is folded."""


class PartCollector:
    """Counts pairs of true and predicted part over points, and keeps a few clouds.

    Kept are the clouds with the smallest intersection over union, and a seeded draw, one for each category.

    Args:
        table: The parts of each category.
        seed: Of the draw.
    """

    def __init__(self, table: PartTable, *, seed: int) -> None:
        self.table = table
        self.seed = seed
        self.categories = GroupMean(table.num_categories)
        self.confusion = torch.zeros(len(table.class_names), len(table.class_names), dtype=torch.int64)
        self._count = 0
        self._drawn = Best(_SAMPLES)
        self._worst = Best(_SAMPLES)

    def add(self, batch: Mapping[str, Any], output: PartOutput) -> None:
        """Take in a batch with its parts (B, N), and the output for it."""
        output = PartOutput(*(tensor.detach().cpu() for tensor in output))
        parts, found = batch["parts"].cpu(), self.table.found(output)
        ious = shape_ious(found, parts, output.category, self.table)
        self.categories.update(ious, output.category)
        size = len(self.table.class_names)
        self.confusion += torch.bincount((parts * size + found).flatten(), minlength=size**2).view(size, size)
        for i, (iou, category) in enumerate(zip(ious.tolist(), output.category.tolist(), strict=True)):
            index = self._count + i
            for best, value in ((self._worst, -iou), (self._drawn, draw(self.seed, index))):
                if best.wants(value, category):
                    sample = {**element(batch, i), _FOUND: found[i].clone(), _IOU: iou}
                    best.add(Kept(index, sample, None, value), category)
        self._count += len(found)

    def sections(self) -> tuple[Section, ...]:
        """Clouds, then figures."""
        if not self._count:
            return ()
        galleries = tuple(
            Gallery(tuple(tile for kept in best.samples() for tile in self._tiles(kept)), title)
            for best, title in ((self._worst, "Smallest intersection over union"), (self._drawn, "A seeded draw"))
        )
        lead = (
            f"A fixed choice among {self._count:,} clouds, one for each category, each in two pictures: its true "
            "parts; and those that were found, wrong points in full colour and right ones pale."
        )
        return Section("samples", "Samples", galleries, lead), self._figures()

    def _tiles(self, kept: Kept) -> tuple[Tile, Tile]:
        """A cloud with its true parts, and with those that were found."""
        parts, found, category = kept.sample["parts"], kept.sample[_FOUND], int(kept.sample["category"])
        own = self.table.parts_of(category)
        seen = {*parts.tolist(), *found.tolist()}
        legend = [self.table.class_names[part].rpartition("/")[2] if part in seen else "" for part in own]
        sample = {"points": kept.sample["points"], FIRST_PART: own[0], LEGEND: legend}
        is_wrong = parts != found
        right = Fact("right points", 1 - float(is_wrong.float().mean()), "share")
        name = self.table.categories[category] or "cloud"
        return (
            Tile(f"{name}, true", {**sample, SHOWN: parts}, None, (Fact("sample", kept.index, "count"),)),
            Tile(f"IoU {100 * kept.sample[_IOU]:.1f} %", {**sample, SHOWN: found, STRONG: is_wrong}, None, (right,)),
        )

    def _figures(self) -> Section:
        rows = [
            (name or "all", int(count), float(mean) if count else None)
            for name, count, mean in zip(
                self.table.categories, self.categories.count, self.categories.means(), strict=True
            )
        ]
        rows.sort(key=lambda row: (row[2] is None, row[2] or 0.0))
        columns = (Column("Category"), Column("Clouds", "count"), Column("Mean IoU", "bar"))
        tables = [Table(columns, tuple(rows), "Figures of each category")]
        names, counts = self.table.class_names, self.confusion.tolist()
        if confused := tuple((names[i], names[j], share) for i, j, _, share in confused_pairs(counts)):
            heads = (Column("True"), Column("Predicted"), Column("Of its points", "share"))
            tables.insert(0, Table(heads, confused, "Most confused pairs"))
        right, total = int(self.confusion.trace()), int(self.confusion.sum())
        lead = f"{right:,} of {total:,} points are right."
        return Section("parts", "Parts", (Row(tuple(tables)), self._parts()), lead)

    def _parts(self) -> Table:
        """Figures of each part over all points, the worst first; parts that never occur last."""
        total = max(int(self.confusion.sum()), 1)
        rows = []
        for i, name in enumerate(self.table.class_names):
            true, taken, right = (
                int(n) for n in (self.confusion[i].sum(), self.confusion[:, i].sum(), self.confusion[i, i])
            )
            union = true + taken - right
            rows.append((name, true / total, right / true if true else None, right / union if union else None))
        rows.sort(key=lambda row: (row[3] is None, row[3] or 0.0))
        columns = (
            Column("Part"), Column("Of all points", "share"), Column("Accuracy", "share"),
            Column("Intersection over union", "bar"),
        )  # fmt: skip
        return Table(columns, tuple(rows), "Figures of each part", folded=len(rows) >= _FOLDED_FROM)
