"""Contrastive training of pictures and captions: CLIP (Radford et al., ICML 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.ranges import PositiveFloat
from peft_modal.tasks.base import Stage, Task
from peft_modal_clip.backbone import OpenCLIPBackbone

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
    classes (zero-shot); where it says which classes were `held_out`, the two kinds are counted apart.

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
    share_metrics: ClassVar[frozenset[str]] = frozenset(_GROUPS.values())

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
        """Accuracy of zero-shot classification, outside training."""
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

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self._classes = None

    def _embed_classes(self) -> Tensor:
        texts = [self.template.replace("{}", name) for name in self.class_names]
        with torch.no_grad():
            return functional.normalize(super().forward({"caption": texts})[:, 0].float(), dim=-1)


def same_texts(batch: Mapping[str, Any]) -> Tensor:
    """Which captions of a batch are the same, (B, B) bool."""
    if "text" in batch:
        text = batch["text"]
        return (text[:, None] == text[None]).all(-1)
    numbers: dict[str, int] = {}
    text = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in batch["caption"]])
    return text[:, None] == text[None]
