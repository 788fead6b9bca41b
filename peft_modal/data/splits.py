"""The base of data modules whose splits are sets of samples: what the command line asks of data, in one place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
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

    def predict_items(self, path: str | Path) -> tuple[Sequence[str | Path], Iterable[Batch]]:
        """Names of the samples below `path`, and batches of them in the same order; called without `setup`.

        Raises:
            ConfigError: This data reads no files.
        """
        raise ConfigError(f"data '{type(self).__name__}' cannot read files to predict on, asked for '{path}'")

    @property
    def num_classes(self) -> int:
        """Number of class names."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that a stage needs and that are not there yet."""
        for part in PARTS[stage]:
            if part not in self._sets:
                self._sets[part] = self.load(part)

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 - what `load` returned
        """What makes the training batches."""
        return ShuffledBatches(samples, self.batch_size, seed=self.seed, augment=self.augment)

    def evaluation_set(self, samples: Any) -> Dataset[Batch]:  # noqa: ANN401 - what `load` returned
        """Validation or test samples as they are read."""
        return samples

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the trainer's current epoch."""
        source = self.train_source(self._sets["train"])
        return epoch_loader(source, trainer=lambda: self.trainer, num_workers=self.num_workers)

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
        dataset = self.evaluation_set(samples)
        return DataLoader(dataset, batch_size=2 * self.batch_size, num_workers=self.num_workers)


class ShuffledBatches:
    """The `BatchSource` of a training set.

    Args:
        samples: The set.
        batch_size: Samples per batch.
        seed: Of order and augmentation.
        augment: Changes a batch at random.
    """

    def __init__(self, samples: Samples, batch_size: int, *, seed: int, augment: Augment | None = None) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment

    def __len__(self) -> int:
        return max(1, len(self.samples) // self.batch_size)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch; see `BatchSource`."""
        order = torch.randperm(len(self.samples), generator=seeded("order", self.seed, epoch))
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.make(chosen.tolist(), seeded("batch", self.seed, epoch, index))

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """The batch of these samples."""
        batch: Batch = default_collate([self.samples[i] for i in chosen])
        return batch if self.augment is None else self.augment(batch, generator)


def require_positive(**numbers: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ConfigError: Names every one of them.
    """
    problems = [f"{name} is {value}, expected 1 or more." for name, value in numbers.items() if value < 1]
    if problems:
        raise ConfigError(*problems)
