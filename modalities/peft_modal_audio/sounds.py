"""Generated sounds: a task and a pre-training in seconds, without a download.

A batch is that of `peft_modal_audio.clips` without a path, with `waveform` (B, S) int16 in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch, BatchSource, DrawnBatches
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, ShuffledBatches, SplitData
from peft_modal.ranges import NonNegativeInt, PositiveFloat, PositiveInt
from peft_modal_audio.features import FrontEnd, Masks, Statistics
from peft_modal_audio.synthesis import Synthesiser, in_a_room, with_noise
from peft_modal_audio.vocabulary import DOWNSTREAM, PRETRAIN

GENERATOR_VERSION: Final = 1
"""Of the generated sounds; to be raised with every change that alters one."""
_SCALE: Final = 32_767
_AT_ONCE: Final = 64
"""Clips that are made at once; it changes which numbers are drawn for a clip."""


class Sounds(SplitData):
    """Generated sounds: instruments, sweeps, percussion, noises and vowels, some of which differ in time order alone.

    `downstream` has 21 classes in rooms and noise, with few training clips and one test set for all seeds; it is kept
    in the cache folder. `pretrain` has 66 other classes without a room and with faint noise, drawn anew for every
    batch, so an epoch is a number of steps.

    Args:
        split: Which classes.
        shots: Training clips per class (downstream).
        val_per_class: Validation clips per class.
        test_per_class: Test clips per class.
        steps: Batches per epoch (pretrain).
        seconds: Length of a clip.
        mels: Mel bins of the spectrogram.
        statistics: See `RecordingData`.
        mask_frequency: See `RecordingData`.
        mask_time: See `RecordingData`.
        batch_size: Clips per training batch; evaluation takes twice as many.
        seed: Of the training and validation clips and of their order. Not of the test clips.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        split: Literal["downstream", "pretrain"] = "downstream",
        shots: PositiveInt = 16,
        val_per_class: PositiveInt = 8,
        test_per_class: PositiveInt = 40,
        steps: PositiveInt = 200,
        seconds: PositiveFloat = 1.28,
        mels: PositiveInt = 128,
        statistics: Statistics = "audioset",
        mask_frequency: NonNegativeInt = 0,
        mask_time: NonNegativeInt = 0,
        batch_size: PositiveInt = 32,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.split: Literal["downstream", "pretrain"] = split
        self.class_names = self.class_names_without_data({"split": split})
        self.steps = steps
        self.front = FrontEnd(max(1, round(100 * seconds)), mels, statistics)
        self.masks = Masks(mask_frequency, mask_time)
        self.synthesiser = Synthesiser(DOWNSTREAM if split == "downstream" else PRETRAIN, self.front.samples)
        self.per_class: dict[Part, int] = {"train": shots, "val": val_per_class, "test": test_per_class}

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The classes of a split; see `peft_modal.inspection.classes.NamesClasses`."""
        return tuple(sound.name for sound in (DOWNSTREAM if arguments["split"] == "downstream" else PRETRAIN))

    @property
    def preprocessing(self) -> dict[str, object]:
        """How waveforms become spectrograms."""
        return {"frames": self.front.frames, "mels": self.front.mels, "statistics": self.front.statistics}

    def class_counts(self) -> list[int]:
        """Training clips of each class; see `CountsClasses`."""
        return [self.per_class["train"]] * len(self.class_names)

    def load(self, part: Part) -> SoundClips:
        """The clips of a split, from the cache if made before; of drawn training batches nothing is kept."""
        if self.split == "pretrain" and part == "train":
            empty = torch.zeros(0, self.front.samples, dtype=torch.int16)
            return SoundClips(empty, torch.zeros(0, self.front.frames, self.front.mels), empty[:, 0].long(), self.front)
        seed = 0 if part == "test" else self.seed
        count = self.per_class[part]

        def make() -> dict[str, Tensor]:
            labels = torch.arange(len(self.class_names)).repeat_interleave(count)
            generator = seeded("sounds", self.split, part, seed)
            starts = range(0, len(labels), _AT_ONCE)
            clips = torch.cat([self.waveforms(labels[start : start + _AT_ONCE], generator) for start in starts])
            stored = (clips * _SCALE).round().to(torch.int16)
            log_mels = torch.stack([self.front.unnormalised(clip) for clip in stored / _SCALE])
            return {"waveform": stored, "log_mels": log_mels, "label": labels}

        key = {
            "generator": GENERATOR_VERSION, "split": self.split, "part": part, "seed": seed, "per_class": count,
            "frames": self.front.frames, "mels": self.front.mels,
        }  # fmt: skip
        tensors = cached_tensors("sounds", key, make)
        return SoundClips(tensors["waveform"], tensors["log_mels"], tensors["label"], self.front)

    def waveforms(self, labels: Tensor, generator: Generator) -> Tensor:
        """Clips (n, S) of classes (n,), as they are heard."""
        clean = self.synthesiser.draw(labels, generator)
        if self.split == "pretrain":
            # Never quite silent, as no recording is.
            return with_noise(clean, generator, snr_db=(10.0, 40.0))
        return with_noise(in_a_room(clean, generator, decay_s=(0.08, 0.6)), generator, snr_db=(-2.0, 15.0))

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 — what `load` returned
        """Batches drawn anew, or shuffled ones of a fixed set."""
        return DrawnBatches(self.draw, self.steps) if self.split == "pretrain" else _Masked(samples, self)

    def draw(self, *key: int | str) -> Batch:
        """One batch of pre-training, by its key."""
        generator = seeded("sounds", self.split, self.seed, *key)
        labels = torch.randint(len(self.class_names), (self.batch_size,), generator=generator)
        clips = self.waveforms(labels, generator)
        hidden = [self.masks.normalised(self.front.unnormalised(clip), self.front, generator) for clip in clips]
        length = torch.full((len(labels),), self.front.frames)
        return {"spectrogram": torch.stack(hidden), "label": labels, "length": length}


class SoundClips(Dataset[Batch]):
    """Clips in memory.

    Args:
        waveforms: (n, S) int16.
        log_mels: (n, T, M), not normalised.
        labels: (n,).
        front: How they are normalised.
    """

    def __init__(self, waveforms: Tensor, log_mels: Tensor, labels: Tensor, front: FrontEnd) -> None:
        self.waveforms = waveforms
        self.log_mels = log_mels
        self.labels = labels
        self.front = front

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.sample(index, self.front.normalised(self.log_mels[index]))

    def sample(self, index: int, spectrogram: Tensor) -> Batch:
        """One sample of a clip's spectrogram (T, M)."""
        return {
            "spectrogram": spectrogram, "label": self.labels[index], "waveform": self.waveforms[index],
            "length": torch.tensor(self.front.frames),
        }  # fmt: skip


class _Masked(ShuffledBatches):
    def __init__(self, samples: SoundClips, data: Sounds) -> None:
        super().__init__(samples, data.batch_size, seed=data.seed)
        self.clips, self.masks, self.front = samples, data.masks, data.front

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        made = [
            self.clips.sample(i, self.masks.normalised(self.clips.log_mels[i], self.front, generator)) for i in chosen
        ]
        return {name: torch.stack([one[name] for one in made]) for name in made[0]}
