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


def members(batches: ShuffledBatches, epoch: int) -> list[list[int]]:
    return [batches.batch(epoch, i)["x"].int().tolist() for i in range(len(batches))]


def test_a_batch_holds_one_group_and_an_epoch_every_sample() -> None:
    samples = [{"x": torch.tensor(float(i))} for i in range(11)]
    groups = ["even" if i % 2 == 0 else "odd" for i in range(11)]
    batches = ShuffledBatches(samples, 4, seed=0, groups=groups)
    epochs = [members(batches, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(len(part) for part in epoch) == [1, 2, 4, 4]
        assert sorted(sum(epoch, start=[])) == list(range(11))  # noqa: RUF017
        assert all(len({i % 2 for i in part}) == 1 for part in epoch)
    assert epochs[0] != epochs[1]
    assert len({tuple(part[0] % 2 for part in epoch) for epoch in epochs}) > 1
    assert members(ShuffledBatches(samples, 4, seed=0, groups=groups), 1) == epochs[1]


def test_the_last_batch_can_be_kept() -> None:
    samples = [{"x": torch.tensor(float(i))} for i in range(7)]
    kept = members(ShuffledBatches(samples, 3, seed=0, drop_last=False), 0)
    assert [len(part) for part in kept] == [3, 3, 1]
    assert kept[:2] == members(ShuffledBatches(samples, 3, seed=0), 0)


def test_groups_do_not_share_evaluation_batches_either() -> None:
    class Grouped(Numbers):
        def groups(self, samples) -> list[bool]:
            return [i > 4 for i in range(len(samples))]

    data = Grouped(sizes={"train": 1, "val": 7, "test": 0}, batch_size=1)
    data.setup()
    assert [batch["x"].tolist() for batch in data.val_dataloader()] == [[0, 1], [2, 3], [4], [5, 6]]
    assert sorted(numbers(data.train_dataloader())) == [100]


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
