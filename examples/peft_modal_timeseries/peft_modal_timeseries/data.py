"""Data modules for time series: generated signals, data sets of the UCR and UEA archives, and folders of CSV files.

A batch is a dict: `series` (B, C, T) float32 and `label` (B,) int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch
from peft_modal.data.folder import list_files, scan_folder
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData, require_positive
from peft_modal.errors import ConfigError, DataError
from peft_modal_timeseries.readers import ARCHIVES, SUFFIXES, Record, read_series
from peft_modal_timeseries.signals import DOWNSTREAM, GENERATOR_VERSION, PRETRAIN, make_signals

Normalize = Literal["series", "none"]


@dataclass(frozen=True, eq=False)
class SeriesSet:
    """The samples of one split."""

    series: Tensor
    """(n, C, T) float32."""
    labels: Tensor
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, index: int) -> Batch:
        return {"series": self.series[index], "label": self.labels[index]}


class TimeSeries(SplitData):
    """What the data modules of this package share.

    Args:
        batch_size: Series per training batch; evaluation takes twice as many.
        length: Steps that every series is brought to, by linear interpolation.
        normalize: `series`: each channel of each series gets mean 0 and deviation 1; `none`: values as stored.
        jitter: Standard deviation of the noise that is added to training series.
        seed: Of order and noise.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self, *, batch_size: int, length: int, normalize: Normalize, jitter: float, seed: int, num_workers: int
    ) -> None:
        require_positive(batch_size=batch_size, length=length)
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if normalize not in {"series", "none"}:
            raise ConfigError(f"normalize is '{normalize}', expected 'series' or 'none'.")
        if not jitter >= 0:
            raise ConfigError(f"jitter is {jitter}, expected 0 or more.")
        self.length = length
        self.normalize: Normalize = normalize
        self.jitter = jitter

    @property
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new series before the network sees it."""
        return {"length": self.length, "normalize": self.normalize}

    def prepare(self, values: Tensor) -> Tensor:
        """A series (C, T) at the length (C, length) and scale that the network sees."""
        values = functional.interpolate(values[None], size=self.length, mode="linear", align_corners=True)[0]
        if self.normalize == "none":
            return values
        centred = values - values.mean(1, keepdim=True)
        return centred / centred.std(1, keepdim=True, correction=0).clamp_min(1e-6)  # a constant channel stays 0

    def augment(self, batch: Batch, generator: Generator) -> Batch:
        """Noise on the series of a training batch."""
        noise = torch.randn(batch["series"].shape, generator=generator)
        return {**batch, "series": batch["series"] + self.jitter * noise}

    def predict_items(self, path: str | Path) -> tuple[Sequence[str | Path], Iterable[Batch]]:
        """Every series below a path: `FILE` for CSV, `FILE#1`, `FILE#2`, ... for files that hold several."""
        names, series = [], []
        for file in list_files(path, SUFFIXES):
            records = read_series(file)
            several = file.suffix.lower() in ARCHIVES
            names += [f"{file}#{number}" if several else str(file) for number in range(1, len(records) + 1)]
            series += [self.prepare(record.values) for record in records]
        samples = [{"series": values} for values in series]
        _same_channels(path, series)
        return names, DataLoader(samples, batch_size=2 * self.batch_size)  # type: ignore[arg-type]  # a list will do

    def pack(self, path: Path, records: Sequence[Record], labels: Sequence[int]) -> SeriesSet:
        """Records as samples; none give an empty set."""
        series = [self.prepare(record.values) for record in records]
        _same_channels(path, series)
        stacked = torch.stack(series) if series else torch.empty(0, 1, self.length)
        return SeriesSet(stacked, torch.tensor(labels, dtype=torch.int64))


class Signals(TimeSeries):
    """Generated signals with two channels.

    `downstream` has 8 families with few training series and one test set for all seeds; `pretrain` has 10 others.

    Args:
        batch_size: Series per training batch; evaluation takes twice as many.
        shots: Training series per family.
        val_per_class: Validation series per family.
        test_per_class: Test series per family.
        length: Steps per series.
        jitter: Standard deviation of the noise that is added to training series.
        split: Which families.
        seed: Of training and validation series, their order and noise. Not of the test series.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        shots: int = 20,
        val_per_class: int = 10,
        test_per_class: int = 50,
        length: int = 256,
        jitter: float = 0.1,
        split: Literal["downstream", "pretrain"] = "downstream",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, length=length, normalize="series", jitter=jitter, seed=seed, num_workers=num_workers
        )
        require_positive(shots=shots, val_per_class=val_per_class, test_per_class=test_per_class)
        if length < 16:
            raise ConfigError(f"length is {length}, expected 16 or more.")
        if split not in {"downstream", "pretrain"}:
            raise ConfigError(f"split is '{split}', expected 'downstream' or 'pretrain'.")
        self.class_names = tuple(DOWNSTREAM if split == "downstream" else PRETRAIN)
        self.per_class: dict[Part, int] = {"train": shots, "val": val_per_class, "test": test_per_class}

    def load(self, part: Part) -> SeriesSet:
        """The series of a split: from the cache if made before, or generated."""
        key = {
            "version": GENERATOR_VERSION,
            "families": self.class_names,
            "part": part,
            "seed": 0 if part == "test" else self.seed,
            "per_class": self.per_class[part],
            "length": self.length,
        }

        def make() -> dict[str, Tensor]:
            generator = seeded("signals", *self.class_names, part, int(key["seed"]))  # type: ignore[call-overload]
            series, labels = make_signals(
                self.class_names, self.per_class[part], length=self.length, generator=generator
            )
            return {"series": torch.stack([self.prepare(values) for values in series]), "label": labels}

        tensors = cached_tensors("signals", key, make)
        return SeriesSet(tensors["series"], tensors["label"])


class Archive(TimeSeries):
    """A data set of the UCR or UEA archive: a folder with `NAME_TRAIN.ts` and `NAME_TEST.ts`, or the same in `.tsv`.

    Args:
        root: The folder, or its `NAME_TRAIN` file where it holds several.
        batch_size: Series per training batch; evaluation takes twice as many.
        length: Steps that every series is brought to, by linear interpolation.
        normalize: `series`: each channel of each series gets mean 0 and deviation 1; `none`: values as stored.
        jitter: Standard deviation of the noise that is added to training series.
        val_share: Share of each class of the training file that is held out for validation.
        seed: Of the held-out series, of order and noise.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        batch_size: int = 32,
        length: int = 256,
        normalize: Normalize = "series",
        jitter: float = 0.1,
        val_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            length=length,
            normalize=normalize,
            jitter=jitter,
            seed=seed,
            num_workers=num_workers,
        )
        if not 0 <= val_share < 1:
            raise ConfigError(f"val_share is {val_share}, expected 0 to below 1.")
        self.root = Path(root)
        self.val_share = val_share
        self._train: list[Record] | None = None

    def load(self, part: Part) -> SeriesSet:
        """The series of a split.

        Raises:
            DataError: The files are not there or cannot be read, or the test file has classes of its own.
        """
        file = self._train_file()
        if self._train is None:
            self._train = read_series(file)
            self.class_names = tuple(sorted({record.label for record in self._train}))
        if part != "test":
            chosen = self._held_out(self._train, want_val=part == "val")
            return self._pack(file, [self._train[i] for i in chosen])
        test = file.with_name(file.name.replace("_TRAIN", "_TEST"))
        if not test.is_file():
            raise DataError(f"'{file}' has no partner '{test.name}'.")
        return self._pack(test, read_series(test))

    def _pack(self, file: Path, records: list[Record]) -> SeriesSet:
        unknown = sorted({record.label for record in records} - set(self.class_names))
        if unknown:
            raise DataError(f"'{file}': class '{unknown[0]}' occurs in no training series.")
        return self.pack(file, records, [self.class_names.index(record.label) for record in records])

    def _train_file(self) -> Path:
        if self.root.is_file():
            found = [self.root] if "_TRAIN" in self.root.name else []
        else:
            found = sorted(p for p in self.root.glob("*_TRAIN.*") if p.suffix.lower() in ARCHIVES)
        if len(found) != 1:
            what = f"{len(found)} such files ({', '.join(p.name for p in found)})" if found else "no such file"
            raise DataError(f"'{self.root}': expected one NAME_TRAIN.ts or NAME_TRAIN.tsv, found {what}.")
        return found[0]

    def _held_out(self, records: list[Record], *, want_val: bool) -> list[int]:
        chosen: list[int] = []
        for name in self.class_names:
            own = [i for i, record in enumerate(records) if record.label == name]
            order = [own[i] for i in torch.randperm(len(own), generator=seeded("held out", self.seed, name)).tolist()]
            count = min(round(self.val_share * len(own)), len(own) - 1)
            chosen += order[:count] if want_val else order[count:]
        return sorted(chosen)


class Folder(TimeSeries):
    """CSV files in `DIR/{train,val,test}/<class>/...` or `DIR/<class>/...`, or those a CSV `path,label[,split]` names.

    Args:
        root: The folder, or the CSV file with the paths.
        batch_size: Series per training batch; evaluation takes twice as many.
        length: Steps that every series is brought to, by linear interpolation.
        normalize: `series`: each channel of each series gets mean 0 and deviation 1; `none`: values as stored.
        jitter: Standard deviation of the noise that is added to training series.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        seed: Of the held-out files, of order and noise.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        batch_size: int = 32,
        length: int = 256,
        normalize: Normalize = "series",
        jitter: float = 0.1,
        val_share: float = 0.1,
        test_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            length=length,
            normalize=normalize,
            jitter=jitter,
            seed=seed,
            num_workers=num_workers,
        )
        self.root = Path(root)
        self.val_share = val_share
        self.test_share = test_share

    def load(self, part: Part) -> SeriesSet:
        """The series of a split."""
        index = scan_folder(
            self.root, suffixes=(".csv",), val_share=self.val_share, test_share=self.test_share, seed=self.seed
        )
        self.class_names = index.class_names
        items = {"train": index.train, "val": index.val, "test": index.test}[part]
        return self.pack(self.root, [read_series(item.path)[0] for item in items], [item.label for item in items])


def _same_channels(path: str | Path, series: Sequence[Tensor]) -> None:
    counts = sorted({len(values) for values in series})
    if len(counts) > 1:
        raise DataError(f"'{path}' holds series of {' and '.join(map(str, counts))} channels; all need the same.")
