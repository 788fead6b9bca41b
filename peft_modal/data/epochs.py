"""Training batches that depend on nothing but the seed, the epoch and their place in it, interrupted or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = dict[str, Any]
"""Tensors with the batch as their first axis, or lists of text with one entry per sample."""


class BatchSource(Protocol):
    """What makes the batches of an epoch."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch, both counted from 0; the same for the same numbers."""


class DrawnBatches:
    """Batches that are drawn anew, each by its numbers; no sample is kept.

    Args:
        draw: Makes a batch of an epoch and a place in it; worker processes receive it pickled.
        steps: Batches per epoch.
    """

    def __init__(self, draw: Callable[[int, int], Batch], steps: int) -> None:
        self.draw = draw
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, index: int) -> Batch:
        """See `BatchSource`."""
        return self.draw(epoch, index)


def epoch_loader(
    source: BatchSource, *, trainer: Callable[[], Trainer | None], num_workers: int = 0
) -> DataLoader[Batch]:
    """A loader that gives the batches of the trainer's current epoch, from the batch where a resumed run goes on.

    (With several processes a run resumed within an epoch begins that epoch's data anew.)

    Args:
        source: Makes the batches, in the worker processes if there are any.
        trainer: Returns the trainer, or None; outside of fitting every pass gives epoch 0.
        num_workers: Worker processes.
    """
    return _EpochLoader(
        _NumberedBatches(source),
        batch_size=None,
        sampler=_EpochSampler(len(source), trainer),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


class _NumberedBatches(Dataset[Batch]):
    """Batches counted through all epochs: number = epoch * batches per epoch + place in the epoch."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Batch:
        return self.source.batch(*divmod(number, len(self.source)))


class _EpochSampler(Sampler[int]):
    def __init__(self, num_batches: int, trainer: Callable[[], Trainer | None]) -> None:
        self.num_batches = num_batches
        self.trainer = trainer

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[int]:
        trainer = self.trainer()
        epoch = start = 0
        if trainer is not None and trainer.training:
            # `trainer.current_epoch` lags behind by one right after the checkpoint of an epoch's end is restored.
            epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # typed as its base
            # With several processes each has its own share of this sampler's numbers, counted by `ready`.
            start = trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer.world_size == 1 else 0
        yield from range(epoch * self.num_batches + start, (epoch + 1) * self.num_batches)


class _EpochLoader(DataLoader[Batch]):
    """Reads the trainer's progress at the first batch: Lightning calls `iter` before it has restored all of it."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # Lightning uses no more than an iterator
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the place in the epoch is the trainer's. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
