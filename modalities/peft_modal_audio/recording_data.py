"""What data modules of recordings share: a base for those that read them; see `peft_modal_audio.clips` for a batch."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, default_collate

from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.folder import FolderIndex, Item, list_files
from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL
from peft_modal.data.progress import progress
from peft_modal.data.shots import draw_per_class
from peft_modal.data.splits import PARTS, Part, ShuffledBatches, SplitData
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share
from peft_modal_audio.clips import Cached, ClipFiles, ClipReader, Window, windows_of
from peft_modal_audio.features import SAMPLE_RATE, FrontEnd, Masks, Resampling, Statistics
from peft_modal_audio.mixing import mixed_pair
from peft_modal_audio.recordings import SUFFIXES, Channel, Reading, check_clip, duration

Crop = Literal["start", "random"]
Unreadable = Literal["refuse", "skip"]
Draw = Literal["seeded", "first"]
_LOG = logging.getLogger(__name__)


class RecordingData(SplitData):
    """Base of data modules that read recordings of classes from files; a subclass says which, in `find`.

    Its constructor names what is its own and hands the rest on as `**options`.

    Args:
        root: What is read.
        seconds: Length of a clip; longer recordings are cut, shorter ones padded. AST's own are 10.24.
        mels: Mel bins of the spectrogram.
        statistics: What log-mel values are normalised by: those of `audioset` (the published network's, and PETL-AST's
            for all data), `esc50`, `speech_commands`, or `none`.
        channel: The `mean` of several channels, or the `first`.
        resampling: Filter that brings other rates to 16 kHz: `kaiser_best`, or `hann`, which takes half the time.
        crop: Where a training clip begins in a longer recording; others begin at its start, as all of AST's do.
        mask_frequency: Widest band of mel bins that SpecAugment hides while training; 0 for none.
        mask_time: Longest stretch of frames, likewise.
        mask_when: AST hides `before` normalising, PETL-AST `after` it.
        mixup: Share of training clips that are mixed with another one, waveforms and labels alike.
        window_hop: `predict` looks at clips that begin this many seconds apart, and tells when each begins and ends;
            null for the first clip of a file alone.
        unreadable: `refuse` ends at a file that cannot be read; `skip` looks at all of them first, leaves those out and
            says which.
        cache: Keep in the cache folder what begins at the start of a file: what is decoded and resampled (`waveforms`),
            or the spectrograms before masks (`spectrograms`). Results stay the same.
        shots: Training clips per class; more of them include the fewer. None takes all.
        draw: Those `shots` are `seeded` ones, or the `first` of each class in the order of the data, as PETL-AST's.
        batch_size: Clips per training batch; evaluation takes twice as many.
        seed: Of order and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: Spectrograms are to be cached, and clips to be cropped at random or mixed.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        seconds: PositiveFloat = 10.24,
        mels: PositiveInt = 128,
        statistics: Statistics = "audioset",
        channel: Channel = "mean",
        resampling: Resampling = "kaiser_best",
        crop: Crop = "start",
        mask_frequency: NonNegativeInt = 0,
        mask_time: NonNegativeInt = 0,
        mask_when: Literal["before", "after"] = "before",
        mixup: Share = 0.0,
        window_hop: PositiveFloat | None = None,
        unreadable: Unreadable = "refuse",
        cache: Cached = "none",
        shots: PositiveInt | None = None,
        draw: Draw = "seeded",
        batch_size: PositiveInt = 32,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if cache == "spectrograms" and (mixup or crop == "random"):
            raise ConfigError("data.cache: 'spectrograms' leaves nothing to crop or mix; take waveforms")
        self.root = Path(root)
        self.front = FrontEnd(max(1, round(100 * seconds)), mels, statistics, resampling)
        self.masks = Masks(mask_frequency, mask_time, mask_when)
        self.crop: Crop = crop
        self.mixup = mixup
        self.window_hop = window_hop
        self.unreadable: Unreadable = unreadable
        self.shots = shots
        self.draw: Draw = draw
        self.targets: Tensor | None = None
        """Of data whose clips have several labels: (n, C), a row for each number that an item has as its label."""
        self.reader = ClipReader(self.front, Reading(channel, resampling), cache)
        self._index: FolderIndex | None = None

    @abstractmethod
    def find(self) -> FolderIndex:
        """The files of the three splits; called once."""

    @property
    def preprocessing(self) -> dict[str, object]:
        """How files become spectrograms."""
        return {
            "frames": self.front.frames, "mels": self.front.mels, "statistics": self.front.statistics,
            "channel": self.reader.reading.channel, "resampling": self.front.resampling,
        }  # fmt: skip

    def setup(self, stage: str | None = None) -> None:
        """Find the files, and leave out those that cannot be read where that is asked for.

        Raises:
            DataError: They cannot serve.
        """
        if self._index is None and PARTS[stage]:
            index = self.find()
            if self.unreadable == "skip":
                train, val, test = self._readable(index.train, index.val, index.test)
                index = replace(index, train=train, val=val, test=test)
            if self.shots is not None:
                index = replace(index, train=self._few(index, self.shots))
            self._index = index
            self.class_names = index.class_names
        super().setup(stage)

    def load(self, part: Part) -> ClipFiles:
        """The files of a split; each is read when it is needed."""
        assert self._index is not None
        items = {"train": self._index.train, "val": self._index.val, "test": self._index.test}[part]
        return ClipFiles(items, self.reader, targets=self.targets)

    def _few(self, index: FolderIndex, shots: int) -> tuple[Item, ...]:
        labels = [item.label for item in index.train]
        asked = {"where": f"'{self.root}'", "asked": "data.shots"}
        drawn = draw_per_class(labels, index.class_names, shots, seed=self.seed, **asked)
        if self.draw == "first":
            places: list[list[int]] = [[] for _ in index.class_names]
            for place, label in enumerate(labels):
                places[label].append(place)
            drawn = [of[:shots] for of in places]
        return tuple(index.train[i] for chosen in drawn for i in chosen)

    def class_counts(self) -> list[int]:
        """Training clips of each class; see `CountsClasses`."""
        labels = torch.tensor([item.label for item in self._sets["train"].items])
        if self.targets is not None:
            return self.targets[labels].sum(0).long().tolist()
        return torch.bincount(labels, minlength=self.num_classes).tolist()

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 — what `load` returned
        """Shuffled batches, each clip read and changed anew."""
        return _AugmentedClips(samples, self)

    def predict_items(self, path: str | Path) -> tuple[Sequence[str | Path | Mapping[str, Any]], Iterable[Batch]]:
        """The files under a path, or windows of them, and batches in the same order.

        Raises:
            DataError: There is no such file. A damaged one is reported when its batch is read, or left out.
        """
        files = list_files(path, SUFFIXES)
        if self.unreadable == "skip":
            (kept,) = self._readable(tuple(Item(file, 0) for file in files))
            files = tuple(item.path for item in kept)
        length = self.front.samples / SAMPLE_RATE
        windows = [window for file in files for window in windows_of(file, length, self.window_hop)]
        if self.unreadable == "skip":
            windows = [window for window in windows if not window.start or self._is_readable(window)]
        names: list[str | Path | Mapping[str, Any]] = [window.path for window in windows]
        if self.window_hop is not None:
            names = [
                {"path": str(window.path), "start": round(window.start, 3), "end": round(window.start + length, 3)}
                for window in windows
            ]
        dataset = ClipFiles([Item(window.path, 0) for window in windows], self.reader, windows, labelled=False)
        return names, DataLoader(dataset, batch_size=2 * self.batch_size, num_workers=self.num_workers)

    def _is_readable(self, window: Window) -> bool:
        try:
            self.reader.waveform(window.path, window.start)
        except DataError as error:
            _LOG.warning("%s What follows after %.1f s is left out.", error, window.start)
            return False
        return True

    def _readable(self, *parts: tuple[Item, ...]) -> list[tuple[Item, ...]]:
        """The files that can be read, of each part.

        Raises:
            DataError: None can.
        """
        faults: dict[Path, str] = {}
        total = sum(map(len, parts))
        with progress("recordings", total) as advance:
            for item in (item for part in parts for item in part):
                try:
                    check_clip(item.path, self.front.samples)
                except DataError as error:
                    faults[item.path] = str(error)
                advance(1)
        if faults:
            if len(faults) == total:
                raise DataError(f"none of {total} files can be read; the first: {next(iter(faults.values()))}")
            told = " ".join(list(faults.values())[:3])
            _LOG.warning("%d of %d files are left out, since they cannot be read: %s", len(faults), total, told)
        return [tuple(item for item in part if item.path not in faults) for part in parts]


class _AugmentedClips(ShuffledBatches):
    """Training batches of files.

    Args:
        samples: The files.
        data: What is done to them.
    """

    def __init__(self, samples: ClipFiles, data: RecordingData) -> None:
        super().__init__(samples, data.batch_size, seed=data.seed)
        self.files = samples
        self.front, self.masks, self.reader = data.front, data.masks, data.reader
        self.crop: Crop = data.crop
        self.mixup = data.mixup
        self.skips = data.unreadable == "skip"

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        made = []
        fault: DataError | None = None
        for index in chosen:
            try:
                made.append(self._sample(index, generator))
            except DataError as error:
                # A file whose start is readable, and what follows is not.
                if not self.skips:
                    raise
                fault = error
                _LOG.warning("%s It is left out of a batch.", error)
        if not made:
            assert fault is not None
            raise fault
        batch: Batch = default_collate(made)
        return batch

    def _sample(self, index: int, generator: Generator) -> Batch:
        item = self.files.items[index]
        start = self._start(item.path, generator)
        if not self.mixup:
            log_mels, length = self.reader.log_mels(item.path, start)
            return self.files.sample(item, self.masks.normalised(log_mels, self.front, generator), length, start)
        waveform = self.reader.waveform(item.path, start)
        partner, own = item, 1.0
        if float(torch.rand((), generator=generator)) < self.mixup:
            partner = self.files.items[int(torch.randint(len(self.files), (), generator=generator))]
            other = self.reader.waveform(partner.path, self._start(partner.path, generator))
            waveform, own = mixed_pair(waveform, other, generator)
        length = self.reader.frames_of(len(waveform))
        spectrogram = self.masks.normalised(self.front.unnormalised(waveform), self.front, generator)
        mixed = {PARTNER_LABEL: self.files.label(partner), OWN_SHARE: torch.tensor(own)}
        return {**self.files.sample(item, spectrogram, length, start), **mixed}

    def _start(self, path: Path, generator: Generator) -> float:
        """Where a clip begins, in seconds."""
        if self.crop == "start":
            return 0.0
        beyond = max(0.0, duration(path) - self.front.samples / SAMPLE_RATE)
        return float(torch.rand((), generator=generator)) * beyond
