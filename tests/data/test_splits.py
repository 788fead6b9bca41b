"""The base of data modules with splits: what a subclass has to give, and what it gets for it."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from peft_modal.data.splits import Part, ShuffledBatches, SplitData
from peft_modal.errors import ConfigError


class Numbers(SplitData):
    def __init__(self, *, sizes: dict[Part, int], batch_size: int = 2, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.class_names = ("only",)
        self.sizes = sizes
        self.loaded: list[Part] = []

    @property
    def preprocessing(self) -> dict[str, object]:
        return {}

    def load(self, part: Part) -> list[dict[str, Tensor]]:
        self.loaded.append(part)
        return [{"x": torch.tensor(float(i))} for i in range(self.sizes[part])]

    def augment(self, batch: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        return {"x": batch["x"] + 100}


def numbers(loader) -> list[float]:
    return [float(x) for batch in loader for x in batch["x"]]


def test_a_stage_loads_the_splits_it_needs_once() -> None:
    data = Numbers(sizes={"train": 3, "val": 1, "test": 1})
    data.setup("fit")
    data.setup("fit")
    assert data.loaded == ["train", "val"]
    data.setup("test")
    assert data.loaded == ["train", "val", "test"]


def test_training_batches_are_shuffled_augmented_and_complete() -> None:
    data = Numbers(sizes={"train": 7, "val": 0, "test": 0}, batch_size=3)
    data.setup("fit")
    seen = numbers(data.train_dataloader())
    assert len(seen) == 6
    assert len(set(seen)) == 6
    assert set(seen) <= {100.0 + i for i in range(7)}
    assert seen != sorted(seen)


def test_evaluation_is_in_order_without_augmentation() -> None:
    data = Numbers(sizes={"train": 1, "val": 5, "test": 3})
    data.setup()
    assert numbers(data.val_dataloader()) == [0, 1, 2, 3, 4]
    assert numbers(data.test_dataloader()) == [0, 1, 2]


def test_an_empty_split_has_no_loader() -> None:
    data = Numbers(sizes={"train": 1, "val": 0, "test": 0})
    data.setup()
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    batches = ShuffledBatches([{"x": torch.tensor(float(i))} for i in range(3)], 8, seed=0)
    assert len(batches) == 1
    assert sorted(batches.batch(0, 0)["x"].tolist()) == [0, 1, 2]


def test_batches_follow_from_seed_and_epoch() -> None:
    samples = [{"x": torch.tensor(float(i))} for i in range(8)]
    first, same, other = (ShuffledBatches(samples, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.batch(2, 1)["x"], same.batch(2, 1)["x"])
    assert not torch.equal(first.batch(2, 1)["x"], first.batch(3, 1)["x"])
    assert not torch.equal(first.batch(2, 1)["x"], other.batch(2, 1)["x"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"batch_size": 0}, "batch_size is 0, expected 1 or more"), ({"num_workers": -1}, "num_workers is -1")],
)
def test_numbers_out_of_range_are_told(arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Numbers(sizes={}, **arguments)


def test_data_that_reads_no_files_says_so_when_asked_to_predict() -> None:
    with pytest.raises(ConfigError, match="data 'Numbers' cannot read files to predict on, asked for 'somewhere'"):
        Numbers(sizes={}).predict_items("somewhere")
