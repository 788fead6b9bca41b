"""Contrastive training of pictures and captions: CLIP (Radford et al., ICML 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.ranges import PositiveFloat
from peft_modal.report import Column, Section, Table
from peft_modal.tasks.base import Stage, Task
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_clip.retrieval import DIRECTIONS, FIGURES, RANKS, RetrievalRecall

CAPTIONS: Final = "captions"
"""Key of a batch for evaluation: all captions of each picture, B tuples of texts."""
_GROUPS = {"accuracy": "accuracy", "seen": "accuracy_seen", "held_out": "accuracy_held_out"}


class Embeddings(NamedTuple):
    """Unit vectors of one batch."""

    image: Tensor
    """(B, D) float32."""
    text: Tensor
    """(B, D) float32."""


class Contrastive(Task):
    """Find the caption of each picture, and the picture of each caption, among those of the batch.

    Pictures whose captions are the same are right answers for each other, which the paper leaves out: its batches have
    no two captions alike. Where evaluation data has labels, every picture is also classified by the names of the
    classes (zero-shot); where it says which classes were `held_out`, the two kinds are counted apart. Where it has all
    `captions` of each picture, recalls at 1, 5 and 10 say how well one is found by the other.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program; method `full` trains both towers and the temperature.
        head: Supplied by the program: `identity`.
        class_names: What zero-shot classification chooses from; supplied by the program.
        template: What the name of a class is put into, at `{}`.
        max_scale: Largest factor of the similarities.
        options: Arguments of `Task`.

    Raises:
        ConfigError: The template has no place for the name, or the backbone embeds no texts.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/loss", "min")
    share_metrics: ClassVar[frozenset[str]] = frozenset({*_GROUPS.values(), *FIGURES})

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        template: str = "{}",
        max_scale: PositiveFloat = 100.0,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        super().__init__(backbone, adapter, head, **options)
        if not isinstance(backbone, OpenCLIPBackbone):
            raise ConfigError(
                f"task 'contrastive' needs a backbone of pictures and texts, got {type(backbone).__name__}"
            )
        if template.count("{}") != 1:
            raise ConfigError(f"task.template: '{template}' has no {{}} for the name of the class, or several")
        self.class_names = class_names
        self.template = template
        self.max_scale = max_scale
        self._classes: Tensor | None = None
        self.recall = RetrievalRecall()
        self._recalled: tuple[int, int, dict[str, float]] | None = None
        count = max(2, len(class_names))
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{group}": MulticlassAccuracy(count, average="micro")
                for stage in ("val", "test")
                for group in _GROUPS
            }
        )

    def forward(self, batch: Mapping[str, Any]) -> Embeddings:
        """Embeddings of the pictures and of their captions."""
        image, text = super().forward(batch)[:, 0].float().chunk(2, dim=-1)
        return Embeddings(functional.normalize(image, dim=-1), functional.normalize(text, dim=-1))

    def losses(self, batch: Mapping[str, Any], output: Embeddings) -> dict[str, Tensor]:
        """Cross-entropy over captions and over pictures, averaged; right answers share their target evenly."""
        scale = self.backbone.similarity_scale.clamp(max=self.max_scale)  # type: ignore[operator]
        logits = scale * output.image @ output.text.T
        right = same_texts(batch).to(logits)
        target = right / right.sum(1, keepdim=True)
        return {"loss": (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Embeddings) -> None:
        """Accuracy of zero-shot classification, and what recalls are computed from, outside training."""
        if stage != "train" and CAPTIONS in batch:
            texts = [text for captions in batch[CAPTIONS] for text in captions]
            self.recall.update(output.image, self._embed(texts), [len(captions) for captions in batch[CAPTIONS]])
        if stage == "train" or "label" not in batch:
            return
        if self._classes is None:
            self._classes = self._embed_classes()
        guesses, labels = output.image @ self._classes.T, batch["label"]
        if "held_out" in batch:
            parts = {"seen": ~batch["held_out"], "held_out": batch["held_out"]}
        else:
            parts = {"accuracy": torch.ones_like(labels, dtype=torch.bool)}
        for group, chosen in parts.items():
            if chosen.any():
                metric = self.metrics[f"{stage}_{group}"]
                metric.update(guesses[chosen], labels[chosen])  # type: ignore[operator]
                self.log(f"{stage}/{_GROUPS[group]}", metric, on_epoch=True, batch_size=len(labels))  # type: ignore[arg-type]

    def on_validation_epoch_start(self) -> None:
        """The towers may have changed: class embeddings are made anew."""
        self._classes = None
        self.recall.reset()

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log recalls."""
        self._log_recalls("val")

    def on_test_epoch_end(self) -> None:
        """Log recalls."""
        self._log_recalls("test")

    def _log_recalls(self, stage: Stage) -> None:
        self._recalled = None
        if self.recall.num_images:
            figures = self.recall.compute()
            self._recalled = self.recall.num_images, self.recall.num_texts, figures
            self.log_dict({f"{stage}/{name}": value for name, value in figures.items()})
            self.recall.reset()

    def report_sections(self) -> tuple[Section, ...]:
        """See `Task`; and how well pictures and captions find each other."""
        sections = super().report_sections()
        return sections if self._recalled is None else (_recall_section(*self._recalled), *sections)

    def _embed_classes(self) -> Tensor:
        return self._embed([self.template.replace("{}", name) for name in self.class_names])

    def _embed(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts, without gradients."""
        with torch.no_grad():
            return functional.normalize(super().forward({"caption": texts})[:, 0].float(), dim=-1)


def _recall_section(num_images: int, num_texts: int, figures: Mapping[str, float]) -> Section:
    rows: tuple[tuple[str | float, ...], ...] = tuple(
        (title, *(figures[f"{direction}_r{rank}"] for rank in RANKS))
        for direction, title in zip(DIRECTIONS, ("texts of a picture", "picture of a text"), strict=True)
    )
    columns = (Column("Looked for"), *(Column(f"Among the first {rank}", "share") for rank in RANKS))
    lead = f"{num_images:,} pictures and {num_texts:,} texts; a picture counts with the nearest of its own texts."
    return Section("retrieval", "Retrieval", (Table(columns, rows, "Recall"),), lead)


def same_texts(batch: Mapping[str, Any]) -> Tensor:
    """Which captions of a batch are the same, (B, B) bool."""
    if "text" in batch:
        text = batch["text"]
        return (text[:, None] == text[None]).all(-1)
    numbers: dict[str, int] = {}
    text = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in batch["caption"]])
    return text[:, None] == text[None]
