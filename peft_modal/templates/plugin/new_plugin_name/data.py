"""Data: a batch is a dict of `sequence` (B, T, F) float32 and `label` (B,) int64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_modal.data.epochs import Batch
from peft_modal.data.folder import list_files, scan_folder
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData, require_positive
from peft_modal.errors import DataError
from torch import Tensor
from torch.utils.data import DataLoader

SUFFIXES = (".npy",)


def read_sequence(path: Path) -> Tensor:
    """The sequence (T, F) float32 in a file.

    Raises:
        DataError: The file is damaged, of another shape, or holds NaN or infinity.
    """
    try:
        values = np.load(path, allow_pickle=False)
        sequence = torch.from_numpy(np.asarray(values, dtype=np.float32))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"'{path}' cannot be read as an array of numbers: {error}"
        ) from error
    if sequence.dim() != 2 or not len(sequence):
        raise DataError(
            f"'{path}' has shape {tuple(sequence.shape)}, expected (steps, features)"
        )
    if not sequence.isfinite().all():
        raise DataError(f"'{path}' holds NaN or infinity")
    return sequence


class Sequences(SplitData):
    """What the data modules of this package share.

    Args:
        batch_size: Sequences per training batch; evaluation takes twice as many.
        length: Steps that every sequence is cut to, or repeated up to.
        seed: Of the order.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self, *, batch_size: int, length: int, seed: int, num_workers: int
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(length=length)
        self.length = length

    @property
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new sequence."""
        return {"length": self.length}

    def prepare(self, sequence: Tensor) -> Tensor:
        """A sequence (length, F) as the network sees it."""
        return sequence[torch.arange(self.length) % len(sequence)]

    def predict_items(
        self, path: str | Path
    ) -> tuple[Sequence[str | Path], Iterable[Batch]]:
        """The files below a path, and batches of them in the same order."""
        files = list_files(path, SUFFIXES)
        samples: Any = [
            {"sequence": self.prepare(read_sequence(file))} for file in files
        ]
        return files, DataLoader(samples, batch_size=2 * self.batch_size)


class Waves(Sequences):
    """Generated waves with two channels: sine, square and sawtooth, with random rate, phase and noise.

    Args:
        batch_size: Sequences per training batch; evaluation takes twice as many.
        per_class: Training sequences per class; half as many to validate and to test.
        length: Steps per sequence.
        noise: Standard deviation of the noise.
        seed: Of sequences and order.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        per_class: int = 32,
        length: int = 48,
        noise: float = 0.3,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, length=length, seed=seed, num_workers=num_workers
        )
        require_positive(per_class=per_class)
        self.class_names = ("sawtooth", "sine", "square")
        self.per_class = per_class
        self.noise = noise

    def load(self, part: Part) -> list[Batch]:
        """The samples of a split."""
        generator = seeded("waves", part, self.seed)
        count = self.per_class if part == "train" else max(1, self.per_class // 2)
        samples: list[Batch] = []
        for label in range(len(self.class_names)):
            for _ in range(count):
                rate, phase = torch.rand(2, generator=generator)
                turns = (2 + 4 * rate) * torch.linspace(0, 1, self.length) + phase
                sine = torch.sin(2 * torch.pi * turns)
                wave = (turns.frac() * 2 - 1, sine, sine.sign())[label]
                both = torch.stack([wave, wave.roll(3)], 1)
                noise = torch.randn(both.shape, generator=generator)
                samples.append(
                    {
                        "sequence": both + self.noise * noise,
                        "label": torch.tensor(label),
                    }
                )
        return samples


class Folder(Sequences):
    """Arrays (steps, features) in `DIR/{train,val,test}/<class>/*.npy` or `DIR/<class>/*.npy`.

    Args:
        root: The folder, or a CSV file with the columns `path,label[,split]`.
        batch_size: Sequences per training batch; evaluation takes twice as many.
        length: Steps that every sequence is cut to, or repeated up to.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        seed: Of the held-out files and the order.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        batch_size: int = 16,
        length: int = 48,
        val_share: float = 0.1,
        test_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, length=length, seed=seed, num_workers=num_workers
        )
        self.root = root
        self.shares = {"val_share": val_share, "test_share": test_share}

    def load(self, part: Part) -> list[Batch]:
        """The samples of a split."""
        index = scan_folder(self.root, suffixes=SUFFIXES, seed=self.seed, **self.shares)
        self.class_names = index.class_names
        items = {"train": index.train, "val": index.val, "test": index.test}[part]
        return [
            {
                "sequence": self.prepare(read_sequence(item.path)),
                "label": torch.tensor(item.label),
            }
            for item in items
        ]
