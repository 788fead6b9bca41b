"""Votes: the mean of the logits decides, beside the single view and only where it is asked for."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_backbones import TinyViT
from torch import Tensor
from torch.utils.data import DataLoader

from peft_modal.errors import ConfigError
from peft_modal.methods.lora import LoRA
from peft_modal.tasks.classification import Classification
from peft_modal.tasks.voting import VotedAccuracy
from peft_modal_heads.linear import LinearHead

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Views(pl.LightningDataModule):
    """Six pictures, and views that say which of them they are."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def test_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randn(6, 3, 16, 16, generator=generator)
        return DataLoader([{"image": x, "label": torch.tensor(i % 3)} for i, x in enumerate(pictures)], batch_size=4)

    def vote(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        return {**batch, "image": batch["image"] + index}


def task(**options: Any) -> Classification:
    torch.manual_seed(0)
    backbone = TinyViT(depth=1)
    adapter = LoRA(rank=2).attach(backbone)
    return Classification(backbone, adapter, LinearHead(backbone.feature_spec(), 3), ("a", "b", "c"), **options)


def figures(model: Classification, data: pl.LightningDataModule) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return {name: float(value) for name, value in trainer.test(model, data, verbose=False)[0].items()}


def test_averaged_logits_decide_and_not_the_majority():
    views = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]).transpose(0, 1)  # (3 views, 1 sample, 2 classes)
    metric = VotedAccuracy(1, best=False)
    metric.update(0, views.mean(0), torch.tensor([0]))
    assert metric.compute() == 1.0


def test_several_votes_have_a_mean_and_a_best():
    for best, expected in ((False, 0.5), (True, 0.75)):
        metric = VotedAccuracy(2, best=best)
        for repeat, right in ((0, 3), (1, 1)):
            for i in range(4):  # one sample a batch
                metric.update(repeat, torch.tensor([[0.0, 1.0]]), torch.tensor([1 if i < right else 0]))
        assert float(metric.compute()) == expected


def test_the_single_view_is_the_main_figure_whatever_is_voted():
    plain = figures(task(), Views())
    data = Views()
    voted = figures(task(votes=3, vote_repeats=2), data)
    assert {name: voted[name] for name in plain} == plain
    assert set(voted) - set(plain) == {"test/accuracy_voted", "test/accuracy_voted_best"}
    assert data.asked == [0, 1, 2, 3, 4, 5] * 2
    assert set(figures(task(votes=3), Views())) - set(plain) == {"test/accuracy_voted"}


def test_the_vote_is_that_of_its_views():
    model, data = task(votes=4), Views()
    found = figures(model, data)
    right = 0
    for batch in data.test_dataloader():
        with torch.no_grad():
            logits = torch.stack([model({**batch, "image": batch["image"] + i}) for i in range(4)]).mean(0)
        right += int((logits.argmax(-1) == batch["label"]).sum())
    assert found["test/accuracy_voted"] == pytest.approx(right / 6)


def test_data_without_views_cannot_be_voted_on():
    class Plain(Views):
        vote = property()  # type: ignore[assignment]

    with pytest.raises(ConfigError, match=r"task\.votes: Plain makes no views to vote over; set votes to 1"):
        figures(task(votes=2), Plain())
