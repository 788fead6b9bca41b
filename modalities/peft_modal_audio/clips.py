"""Clips of recordings: windows of files, what is read and kept of them.

A batch is a dict: `spectrogram` (B, T, M) float32, `label` (B,) int64, `length` (B,) int64, the frames that are not
padding, and `path`, B texts, with `start` (B,) float64, where the clip begins in its file, in seconds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_modal.data.epochs import Batch
from peft_modal.data.folder import Item
from peft_modal.data.sample_cache import SampleCache
from peft_modal.errors import DataError, WriteError
from peft_modal_audio.features import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, FrontEnd
from peft_modal_audio.recordings import Reading, duration, read_clip

Cached = Literal["none", "waveforms", "spectrograms"]
CACHE_VERSION: Final = 1
"""Of what is cached of a recording; to be raised with every change that alters it."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """A part of a file that is predicted on."""

    path: Path
    start: float = 0.0
    """Seconds."""


def windows_of(path: Path, length: float, hop: float | None) -> list[Window]:
    """Windows that begin `hop` seconds apart, as many as it takes to reach the end of a file; one without a hop.

    Raises:
        DataError: The file cannot be read.
    """
    if hop is None:
        return [Window(path)]
    beyond = max(0.0, duration(path) - length)
    # A remainder of less than a frame is not worth a window.
    count = 1 + int(-(-(beyond - FRAME_SHIFT / SAMPLE_RATE) // hop)) if beyond else 1
    return [Window(path, number * hop) for number in range(max(1, count))]


class ClipReader:
    """Clips and spectrograms of files, out of the cache where that is asked for.

    Args:
        front: What is made of a waveform.
        reading: How a file becomes one.
        cached: What is kept; see `RecordingData`.
    """

    def __init__(self, front: FrontEnd, reading: Reading, cached: Cached = "none") -> None:
        self.front = front
        self.reading = reading
        self.cached: Cached = cached
        key: dict[str, object] = {
            "version": CACHE_VERSION, "what": cached, "channel": reading.channel, "resampling": reading.resampling,
            "samples": front.samples,
        }  # fmt: skip
        if cached == "spectrograms":
            key |= {"frames": front.frames, "mels": front.mels}
        self.cache = None if cached == "none" else SampleCache("recordings", key)

    def waveform(self, path: Path, start_s: float = 0.0) -> Tensor:
        """A clip (S,) of a file, S as many samples as the spectrogram takes, or fewer at its end."""

        def make() -> Tensor:
            return read_clip(path, samples=self.front.samples, start_s=start_s, reading=self.reading)

        # Clips from anywhere in a file never come again.
        return self._kept(path, make) if self.cached == "waveforms" and not start_s else make()

    def log_mels(self, path: Path, start_s: float = 0.0) -> tuple[Tensor, int]:
        """The spectrogram (T, M) of a clip before it is normalised, and how many frames are not padding."""
        if self.cached != "spectrograms" or start_s:
            waveform = self.waveform(path, start_s)
            return self.front.unnormalised(waveform), self.frames_of(len(waveform))

        def make() -> Tensor:
            waveform = self.waveform(path, start_s)
            return self.front.unnormalised(waveform)[: self.frames_of(len(waveform))]

        kept = self._kept(path, make)
        return torch.nn.functional.pad(kept, (0, 0, 0, self.front.frames - len(kept))), len(kept)

    def frames_of(self, samples: int) -> int:
        """Frames of a waveform, no more than a spectrogram has."""
        return min(self.front.frames, 1 + max(0, samples - FRAME_LENGTH) // FRAME_SHIFT)

    def _kept(self, path: Path, make: Callable[[], Tensor]) -> Tensor:
        assert self.cache is not None
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"'{path}' does not exist or is not a file.") from error
        text = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        found = self.cache.get(name)
        if found is not None:
            return found["clip"]
        clip = make()
        try:
            self.cache.put(name, {"clip": clip})
        except WriteError as error:
            _LOG.warning("%s: it is made again next time", error)
        return clip


class ClipFiles(Dataset[Batch]):
    """Clips of files on disk.

    Args:
        items: Files and labels.
        reader: Makes spectrograms of them.
        windows: Where each clip begins; None for the start.
        targets: What an item's label is the row of; None for labels that are classes.
        labelled: Whether the labels mean anything.
    """

    def __init__(
        self, items: Sequence[Item], reader: ClipReader, windows: Sequence[Window] | None = None, *,
        targets: Tensor | None = None, labelled: bool = True,
    ) -> None:  # fmt: skip
        self.items = items
        self.reader = reader
        self.windows = windows
        self.targets = targets
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        item = self.items[index]
        start = 0.0 if self.windows is None else self.windows[index].start
        log_mels, length = self.reader.log_mels(item.path, start)
        return self.sample(item, self.reader.front.normalised(log_mels), length, start)

    def sample(self, item: Item, spectrogram: Tensor, length: int, start: float) -> Batch:
        """One sample of a file's spectrogram (T, M)."""
        one: Batch = {
            "spectrogram": spectrogram, "length": torch.tensor(length), "path": str(item.path),
            "start": torch.tensor(start, dtype=torch.float64),
        }  # fmt: skip
        return {**one, "label": self.label(item)} if self.labelled else one

    def label(self, item: Item) -> Tensor:
        """The class () of a file, or its labels (C,)."""
        return torch.tensor(item.label) if self.targets is None else self.targets[item.label]
