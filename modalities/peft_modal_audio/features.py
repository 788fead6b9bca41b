"""From a waveform to the spectrogram that a network reads, and the masks that hide parts of it while training.

Everything that torchaudio does is called here. Its arguments are those of Gong et al., AST, Interspeech 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional

from peft_modal.errors import DataError
from peft_modal.extras import require

SAMPLE_RATE: Final = 16_000
"""Samples a second of what is made into a spectrogram."""
FRAME_LENGTH: Final = 400
"""Samples of a frame, 25 ms; a shorter waveform is padded to one frame."""
FRAME_SHIFT: Final = 160
"""Samples from frame to frame, 10 ms."""
Statistics = Literal["audioset", "esc50", "speech_commands", "none"]
STATISTICS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "audioset": (-4.2677393, 4.5689974),
        "esc50": (-6.6268077, 5.358466),
        "speech_commands": (-6.845978, 5.5654526),
        "none": (0.0, 0.5),
    }
)
"""Mean and deviation of log-mel values of whole data sets; of AST's authors, but for the last."""
_LONGEST_KERNEL: Final = 1_000
"""Samples after which the filter of a resampling repeats, at most: 44,101 to 16,000 Hz would take minutes and GBs."""
RATES: Final = (1_000, 1_000_000)
"""The lowest and the highest number of samples a second that a recording may have."""
Resampling = Literal["kaiser_best", "hann"]
FILTERS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        # As librosa calls the filter with which PETL-AST's features were made.
        "kaiser_best": {
            "lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "resampling_method": "sinc_interp_kaiser",
            "beta": 14.769656459379492,
        },
        # torchaudio's own, twice as fast; it cuts off the top ten mel bins differently.
        "hann": {},
    }
)  # fmt: skip
"""torchaudio's arguments for each filter of a resampling."""


@dataclass(frozen=True)
class FrontEnd:
    """What is done to every waveform.

    Args:
        frames: Length of the spectrogram in frames of 10 ms.
        mels: Mel bins.
        statistics: By what it is normalised: a name of `STATISTICS`.
        resampling: By which filter other rates become `SAMPLE_RATE`: a name of `FILTERS`.
    """

    frames: int
    mels: int
    statistics: Statistics
    resampling: Resampling = "kaiser_best"

    @property
    def samples(self) -> int:
        """Samples at `SAMPLE_RATE` that fill all frames."""
        return FRAME_LENGTH + (self.frames - 1) * FRAME_SHIFT

    def unnormalised(self, waveform: Tensor, rate: int = SAMPLE_RATE) -> Tensor:
        """Log-mel values (frames, mels) of a waveform (S,) in -1..1; too short a one ends in zeros, which are loud.

        Zeros, not silence: that is what AST was trained with.
        """
        return fitted(log_mel(resampled(waveform, rate, self.resampling), self.mels), self.frames)

    def normalised(self, log_mels: Tensor) -> Tensor:
        """(x - mean) / (2 deviation): AST's deviation is 0.5."""
        mean, deviation = STATISTICS[self.statistics]
        return (log_mels - mean) / (2 * deviation)

    def spectrogram(self, waveform: Tensor, rate: int = SAMPLE_RATE) -> Tensor:
        """What the network reads of a waveform (S,) in -1..1 of any rate and length: (frames, mels) float32."""
        return self.normalised(self.unnormalised(waveform, rate))


@dataclass(frozen=True)
class Masks:
    """SpecAugment: one band of frequencies and one stretch of time are hidden (Park et al., 2019, arXiv:1904.08779).

    Args:
        frequency: The widest band, in mel bins; 0 for none.
        time: The longest stretch, in frames; 0 for none.
        when: AST hides before normalising, so that what is hidden equals padding; PETL-AST after it, so that it equals
            the mean.
    """

    frequency: int = 0
    time: int = 0
    when: Literal["before", "after"] = "before"

    def hide(self, log_mels: Tensor, generator: Generator) -> Tensor:
        """A spectrogram (T, M) with zeros in the band and the stretch."""
        if not self.frequency and not self.time:
            return log_mels
        transforms: Any = require("torchaudio.transforms", extra="audio")
        # torchaudio draws from the global numbers.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            hidden: Tensor = log_mels.T[None]
            if self.frequency:
                hidden = transforms.FrequencyMasking(self.frequency)(hidden)
            if self.time:
                hidden = transforms.TimeMasking(self.time)(hidden)
        return hidden[0].T.contiguous()

    def normalised(self, log_mels: Tensor, front: FrontEnd, generator: Generator) -> Tensor:
        """`FrontEnd.normalised` with parts of the spectrogram (T, M) hidden."""
        if self.when == "before":
            return front.normalised(self.hide(log_mels, generator))
        return self.hide(front.normalised(log_mels), generator)


def resampled(waveform: Tensor, rate: int, resampling: Resampling = "kaiser_best") -> Tensor:
    """A waveform (S,) at `SAMPLE_RATE`.

    A ratio of rates without a large common divisor is replaced by the nearest simple one, which is off by a
    hundred-thousandth or less.

    Raises:
        DataError: The rate is none of a recording.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"a sample rate of {rate:,} Hz is outside {RATES[0]:,}..{RATES[1]:,}.")
    if rate == SAMPLE_RATE or not len(waveform):
        return waveform
    ratio = Fraction(SAMPLE_RATE, rate)
    if ratio < 1:
        ratio = ratio.limit_denominator(_LONGEST_KERNEL)
    else:
        ratio = 1 / (1 / ratio).limit_denominator(_LONGEST_KERNEL)
    torchaudio: Any = require("torchaudio.functional", extra="audio")
    found: Tensor = torchaudio.resample(waveform, ratio.denominator, ratio.numerator, **FILTERS[resampling])
    return found


def log_mel(waveform: Tensor, mels: int) -> Tensor:
    """Kaldi's filter bank of a waveform (S,) in -1..1 at `SAMPLE_RATE`: natural logarithms of energies, (F, mels).

    F = 1 + (S - 400) // 160; silence is log(2**-23) everywhere.
    """
    kaldi: Any = require("torchaudio.compliance.kaldi", extra="audio")
    missing = max(0, FRAME_LENGTH - len(waveform))
    # Not scaled to 16-bit integers, as Kaldi's users do: AST is not either.
    found: Tensor = kaldi.fbank(
        functional.pad(waveform, (0, missing))[None], sample_frequency=SAMPLE_RATE, window_type="hanning",
        num_mel_bins=mels, frame_shift=10, dither=0.0, use_energy=False, htk_compat=True,
    )  # fmt: skip
    return found


def fitted(log_mels: Tensor, frames: int) -> Tensor:
    """The first `frames` of a spectrogram (F, M), zeros behind a shorter one."""
    return functional.pad(log_mels[:frames], (0, 0, 0, max(0, frames - len(log_mels))))
