"""Several labels for a sample: loss, mean average precision, predictions, and what a report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_backbones import TinyViT
from torch import Tensor
from torch.nn import functional

from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL
from peft_modal.errors import DataError
from peft_modal.methods.lora import LoRA
from peft_modal.report import Gallery, Table
from peft_modal.tasks.multi_label import MultiLabel
from peft_modal.tasks.multi_label_report import MultiLabelCollector
from peft_modal_heads.linear import LinearHead

NAMES = ("bird", "cat", "dog")
LABELS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).float()


def task(**options: Any) -> MultiLabel:
    backbone = TinyViT()
    adapter = LoRA(rank=2).attach(backbone)
    return MultiLabel(backbone, adapter, LinearHead(backbone.feature_spec(), 3), NAMES, **options)


def test_the_loss_is_that_of_each_label_and_mixed_samples_have_shares() -> None:
    logits = torch.randn(4, 3)
    plain = task().losses({"label": LABELS}, logits)["loss"]
    assert torch.allclose(plain, functional.binary_cross_entropy_with_logits(logits, LABELS))
    own = torch.tensor([1.0, 0.3, 0.5, 0.0])
    batch = {"label": LABELS, PARTNER_LABEL: LABELS.flip(0), OWN_SHARE: own}
    target = own[:, None] * LABELS + (1 - own)[:, None] * LABELS.flip(0)
    expected = functional.binary_cross_entropy_with_logits(logits, target)
    assert torch.allclose(task().losses(batch, logits)["loss"], expected)


def test_classes_are_refused_with_the_task_that_takes_them() -> None:
    with pytest.raises(
        DataError, match=r"labels of shape \(4, 3\), the data has \(4,\); .* take task 'classification'"
    ):
        task().losses({"label": torch.zeros(4, dtype=torch.int64)}, torch.randn(4, 3))


def average_precision(scores: Tensor, labels: Tensor) -> float:
    order = scores.argsort(descending=True)
    right = labels[order]
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return float((precision * right).sum() / right.sum())


def test_the_metric_is_the_mean_of_average_precisions_of_labels_that_occur() -> None:
    made, logits = task(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    made.log = lambda *_, **__: None  # type: ignore[method-assign]
    made.update_metrics("test", {"label": LABELS}, logits)
    made.update_metrics("train", {"label": LABELS}, logits)
    expected = sum(average_precision(logits[:, i], LABELS[:, i]) for i in range(2)) / 2
    assert float(made.metrics["test_metric"].compute()) == pytest.approx(expected)  # type: ignore[operator]


def test_predictions_name_what_is_likely_enough() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0], [-3.0, -2.0, -1.0]])
    first, second = task().predictions(logits)
    assert first["labels"] == "dog;bird"
    assert second["labels"] == ""
    assert second["probabilities"]["dog"] == pytest.approx(0.268941, abs=1e-5)
    assert task(threshold=0.2).predictions(logits)[1]["labels"] == "dog"


def test_a_report_has_the_largest_mistakes_and_every_label() -> None:
    collector = MultiLabelCollector(NAMES, task().predictions, seed=0)
    assert collector.sections() == ()
    logits = 8 * (LABELS - 0.5)
    logits[1] = -logits[1]
    for rows in (slice(0, 2), slice(2, 4)):
        collector.add({"label": LABELS[rows]}, logits[rows])
    samples, labels = collector.sections()
    worst, drawn = samples.blocks
    assert isinstance(worst, Gallery)
    assert isinstance(drawn, Gallery)
    assert worst.tiles[0].facts[1].value == 1
    assert worst.tiles[0].facts[0].value == "cat"
    assert len(drawn.tiles) == 4
    (table,) = labels.blocks
    assert isinstance(table, Table)
    rows = {row[0]: row[1:] for row in table.rows}
    # The one that is taken for a bird and a dog is as sure as the true birds: two of three are right.
    assert rows["bird"] == (2, pytest.approx(2 / 3))
    assert rows["dog"] == (0, None)
    assert table.rows[-1][0] == "dog"
