"""The base of data modules whose splits are sets of samples: what the command line asks of data, in one place."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator
from torch.utils.data import DataLoader, Dataset, default_collate

from peft_modal.data.epochs import Batch, BatchSource, epoch_loader
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError

Part = Literal["train", "val", "test"]
Augment = Callable[[Batch, Generator], Batch]

PARTS: Final[Mapping[str | None, tuple[Part, ...]]] = MappingProxyType(
    {
        "fit": ("train", "val"),
        "validate": ("val",),
        "test": ("test",),
        "predict": (),
        None: ("train", "val", "test"),
    }
)
"""Which splits a stage of the trainer needs."""


class Samples(Protocol):
    """The samples of a split, each a mapping of tensors."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 - a mapping, or a tensor where `make` is given
        """One of them."""


class SplitData(LightningDataModule):
    """Base of data modules with training, validation and test samples; `fit`, `test` and `predict` need no more.

    A subclass gives `load` and `preprocessing`, sets `class_names` (in its constructor, or in `load` where they are
    known only then), and `predict_items` where it reads files. Training batches are shuffled, the last incomplete one
    is dropped (a smaller set is one batch); all of it follows from the seed, the epoch and the place of the batch.

    Args:
        batch_size: Samples per training batch; evaluation takes twice as many.
        seed: Of order and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range.
    """

    class_names: tuple[str, ...]
    """One name per label."""

    def __init__(self, *, batch_size: int, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        require_positive(batch_size=batch_size)
        if num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers}, expected 0 or more.")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.class_names = ()
        self._sets: dict[Part, Any] = {}

    @property
    @abstractmethod
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new sample before the network sees it; goes into the adapter file as JSON."""

    @abstractmethod
    def load(self, part: Part) -> Sized:
        """The `Samples` of a split, empty where there are none; each with a `label` where there are labels.

        A subclass that gives `train_source` and `evaluation_set` may return what these take.
        """

    def augment(self, batch: Batch, generator: Generator) -> Batch:
        """A training batch changed at random, by numbers of `generator` only; the base leaves it as it is."""
        del generator
        return batch

    def predict_items(self, path: str | Path) -> tuple[Sequence[str | Path | Mapping[str, Any]], Iterable[Batch]]:
        """Names of the samples below `path`, and batches of them in the same order; called without `setup`.

        A sample that is a part of a file is named by a mapping, whose entries become columns of the table: `path`,
        `start`, `end`.

        Raises:
            ConfigError: This data reads no files.
        """
        raise ConfigError(f"data '{type(self).__name__}' cannot read files to predict on, asked for '{path}'")

    def no_samples(self, part: Part) -> str:
        """The sentence that `validate` and `test` end in where a split is empty: what to do about it, if anything."""
        return f"data '{type(self).__name__}' has no {part} samples to measure on."

    @property
    def num_classes(self) -> int:
        """Number of class names."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that a stage needs and that are not there yet."""
        for part in PARTS[stage]:
            if part not in self._sets:
                self._sets[part] = self.load(part)

    def groups(self, samples: Any) -> Sequence[Hashable] | None:  # noqa: ANN401 - what `load` returned
        """The group of each sample, where only samples of one group can share a batch (pictures of one shape)."""
        del samples
        return None

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 - what `load` returned
        """What makes the training batches."""
        groups = self.groups(samples)
        return ShuffledBatches(samples, self.batch_size, seed=self.seed, augment=self.augment, groups=groups)

    def evaluation_set(self, samples: Any) -> Dataset[Batch]:  # noqa: ANN401 - what `load` returned
        """Validation or test samples as they are read."""
        return samples

    def collate(self, samples: list[Any]) -> Batch:
        """A batch of evaluation samples; by default each key stacked."""
        batch: Batch = default_collate(samples)
        return batch

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the trainer's current epoch."""
        source = self.train_source(self._sets["train"])
        return epoch_loader(source, trainer=lambda: self.trainer, num_workers=self.num_workers)

    def plain_training_set(self, samples: Any) -> Dataset[Batch]:  # noqa: ANN401 - what `load` returned
        """Training samples as they are, for methods that calibrate on them."""
        return self.evaluation_set(samples)

    def plain_train_dataloader(self) -> DataLoader[Batch]:
        """Every training sample once, in a fixed order and without augmentation."""
        samples = self._sets["train"]
        return self._fixed_loader(self.plain_training_set(samples), self.groups(samples))

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Validation samples in a fixed order; an empty list where the data has none."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Test samples in a fixed order; an empty list where the data has none."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, part: Part) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        samples = self._sets[part]
        if not len(samples):
            return []
        return self._fixed_loader(self.evaluation_set(samples), self.groups(samples))

    def _fixed_loader(self, dataset: Dataset[Batch], groups: Sequence[Hashable] | None) -> DataLoader[Batch]:
        if groups is None:
            return DataLoader(
                dataset, batch_size=2 * self.batch_size, num_workers=self.num_workers, collate_fn=self.collate
            )
        batches = batches_within(groups, range(len(groups)), 2 * self.batch_size)
        return DataLoader(dataset, batch_sampler=batches, num_workers=self.num_workers, collate_fn=self.collate)


class ShuffledBatches:
    """The `BatchSource` of a training set.

    Args:
        samples: The set.
        batch_size: Samples per batch.
        seed: Of order and augmentation.
        augment: Changes a batch at random.
        groups: The group of each sample, where a batch may hold samples of one group only; the batches of all groups
            come in a random order.
        drop_last: Drop a last batch of fewer samples; always kept where there are groups, of which some may be small.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        seed: int,
        augment: Augment | None = None,
        groups: Sequence[Hashable] | None = None,
        drop_last: bool = True,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.groups = groups
        self.drop_last = drop_last and groups is None

    def __len__(self) -> int:
        if self.drop_last:
            return max(1, len(self.samples) // self.batch_size)
        counts = [len(self.samples)] if self.groups is None else Counter(self.groups).values()
        return sum(math.ceil(count / self.batch_size) for count in counts)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch; see `BatchSource`."""
        order = torch.randperm(len(self.samples), generator=seeded("order", self.seed, epoch))
        if self.groups is None:
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size].tolist()
        else:
            batches = batches_within(self.groups, order.tolist(), self.batch_size)
            place = torch.randperm(len(batches), generator=seeded("batches", self.seed, epoch))[index]
            chosen = batches[int(place)]
        return self.make(chosen, seeded("batch", self.seed, epoch, index))

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """The batch of these samples."""
        batch: Batch = default_collate([self.samples[i] for i in chosen])
        return batch if self.augment is None else self.augment(batch, generator)


def batches_within(groups: Sequence[Hashable], order: Iterable[int], batch_size: int) -> list[list[int]]:
    """Batches of samples of one group each, in an order of the samples; the last one of a group may be smaller.

    Args:
        groups: The group of each sample.
        order: Sample numbers, each once.
        batch_size: The most samples in a batch.
    """
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index in order:
        members[groups[index]].append(index)
    return [
        chosen[start : start + batch_size] for chosen in members.values() for start in range(0, len(chosen), batch_size)
    ]


def require_positive(**numbers: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ConfigError: Names every one of them.
    """
    problems = [f"{name} is {value}, expected 1 or more." for name, value in numbers.items() if value < 1]
    if problems:
        raise ConfigError(*problems)
