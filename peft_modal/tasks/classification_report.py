"""What classification adds to a report: confusion matrix, accuracy of each class, and samples with predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from peft_modal.report import (
    Best,
    Block,
    Column,
    Fact,
    Gallery,
    Kept,
    Row,
    Section,
    Table,
    Tile,
    draw,
    element,
    matrix_chart,
)
from peft_modal.tasks.confusion import confused_pairs

_SAMPLES: Final = 6
_LARGEST_MATRIX: Final = 60
"""Classes of which a matrix is still a picture; beyond, it shows those with the most mistakes."""
_FOLDED_FROM: Final = 16
"""Rows of the table of classes from which on it is folded."""


class ClassificationCollector:
    """Counts pairs of true and predicted class, and keeps a few samples.

    Kept are a seeded draw of right ones, one for each class, and the mistakes with the highest probability, one for
    each pair of classes.

    Args:
        class_names: In label order.
        predictions: A task's rows for an output.
        seed: Of the draw.
        explain: What a modality's renderer shall have of a kept sample beside it, such as its relevance.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        predictions: Callable[[Tensor], list[dict[str, Any]]],
        *,
        seed: int,
        explain: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        self.class_names = tuple(class_names)
        self.predictions = predictions
        self.seed = seed
        self.explain = explain
        self.confusion = MulticlassConfusionMatrix(len(self.class_names))
        self._count = 0
        self._right = Best(_SAMPLES)
        self._wrong = Best(_SAMPLES)

    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Take in logits (B, C) and labels (B,)."""
        probabilities, found = output.detach().float().softmax(-1).cpu().max(-1)
        labels = batch["label"].detach().cpu()
        self.confusion.update(found, labels)
        for i, (label, guess, probability) in enumerate(
            zip(labels.tolist(), found.tolist(), probabilities.tolist(), strict=True)
        ):
            index = self._count + i
            is_right = label == guess
            best, group = (self._right, label) if is_right else (self._wrong, (label, guess))
            value = draw(self.seed, index) if is_right else probability
            if best.wants(value, group):
                (prediction,) = self.predictions(output[i : i + 1].detach())
                best.add(Kept(index, element(batch, i), prediction, value), group)
        self._count += len(labels)

    def sections(self) -> tuple[Section, ...]:
        """Samples, then mistakes by class."""
        if not self._count:
            return ()
        counts: list[list[int]] = self.confusion.compute().tolist()
        return (self._samples(), self._mistakes(counts))

    def _samples(self) -> Section:
        galleries = [
            Gallery(tuple(self._tile(kept) for kept in best.samples()), title)
            for best, title in ((self._wrong, "Most confident mistakes"), (self._right, "Right"))
            if best.samples()
        ]
        lead = (
            f"A fixed choice among {self._count:,} samples: the mistakes with the highest probability, one for each "
            "pair of classes, and a seeded draw of right ones, one for each class."
        )
        if self.explain is not None:
            lead += " A line encloses what speaks most for the predicted class (input times gradient)."
        return Section("samples", "Samples", tuple(galleries), lead)

    def _tile(self, kept: Kept) -> Tile:
        assert kept.prediction is not None
        found = str(kept.prediction["class"])
        truth = self.class_names[int(kept.sample["label"])]
        probability = float(kept.prediction["probabilities"][found])
        similarity = kept.prediction.get("similarity")
        facts = (
            Fact("true", truth), Fact("probability", probability, "share"),
            *(() if similarity is None else (Fact("similarity", similarity, "number"),)),
            Fact("sample", kept.index, "count"),
        )  # fmt: skip
        sample = kept.sample if self.explain is None else {**kept.sample, **self.explain(kept.sample)}
        return Tile(found, sample, kept.prediction, facts, "right" if found == truth else "wrong")

    def _mistakes(self, counts: list[list[int]]) -> Section:
        names = self.class_names
        right = sum(counts[i][i] for i in range(len(names)))
        blocks: list[Block] = [Row((*self._pairs(counts), self._classes(counts)))]
        chosen = list(range(len(names)))
        title = "Confusion matrix"
        if len(names) > _LARGEST_MATRIX:
            wrong = [sum(row) - row[i] + sum(other[i] for other in counts) - row[i] for i, row in enumerate(counts)]
            chosen = sorted(sorted(chosen, key=lambda i: (-wrong[i], i))[:_LARGEST_MATRIX])
            title = f"Confusion matrix of the {_LARGEST_MATRIX} classes with the most mistakes"
        matrix = [[counts[i][j] for j in chosen] for i in chosen]
        blocks.append(
            matrix_chart([names[i] for i in chosen], matrix, rows="True class", columns="Predicted class", title=title)
        )
        lead = f"{right:,} of {self._count:,} samples are right."
        return Section("classes", "Classes", tuple(blocks), lead)

    def _pairs(self, counts: list[list[int]]) -> tuple[Table, ...]:
        """The most confused pairs; none where nothing is wrong."""
        names = self.class_names
        rows = tuple((names[i], names[j], count, share) for i, j, count, share in confused_pairs(counts))
        columns = (Column("True"), Column("Predicted"), Column("Samples", "count"), Column("Of its class", "share"))
        return (Table(columns, rows, "Most confused pairs"),) if rows else ()

    def _classes(self, counts: list[list[int]]) -> Table:
        """Accuracy of each class, the worst first; classes without samples last."""
        rows = []
        for i, name in enumerate(self.class_names):
            total = sum(counts[i])
            rows.append((name, total, counts[i][i], counts[i][i] / total if total else None))
        rows.sort(key=lambda row: (row[3] is None, row[3] or 0.0))
        columns = (Column("Class"), Column("Samples", "count"), Column("Right", "count"), Column("Accuracy", "bar"))
        return Table(columns, tuple(rows), "Accuracy of each class", folded=len(rows) >= _FOLDED_FROM)
