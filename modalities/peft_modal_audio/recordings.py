"""One waveform out of one sound file of any format, rate, depth, length and number of channels.

libsndfile reads them, by way of soundfile; torchaudio's own reader needs FFmpeg on the system.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_modal.errors import DataError
from peft_modal.extras import require
from peft_modal_audio.features import RATES, SAMPLE_RATE, Resampling, resampled

SUFFIXES: Final = (
    ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".w64", ".wav",
)  # fmt: skip
"""Endings of the files that `read_clip` is for; upper and lower case. What a file is, its content says."""
Channel = Literal["mean", "first"]
_MARGIN_S: Final = 0.05
"""Read on each side of a clip within a longer file, so that the filter of a resampling does not see its edge."""


@dataclass(frozen=True)
class Reading:
    """How files become waveforms.

    Args:
        channel: Of several channels their `mean`, or the `first`, as PETL-AST takes of UrbanSound8K.
        resampling: See `FrontEnd`.
    """

    channel: Channel = "mean"
    resampling: Resampling = "kaiser_best"


def duration(path: str | Path) -> float:
    """Seconds of a file, as its header tells.

    Raises:
        DataError: It is missing, no sound file, or empty.
    """
    with _opened(Path(path)) as file:
        return file.frames / file.samplerate


def read_clip(
    path: str | Path, *, samples: int | None = None, start_s: float = 0.0, reading: Reading = Reading()
) -> Tensor:
    """A mono waveform (S,) at `SAMPLE_RATE` of a file, or of a part of it; no more than that part is decoded.

    Args:
        path: The file.
        samples: S, at most; None for all that follows.
        start_s: Where the part begins, in seconds.
        reading: Which channel, and how other rates are resampled.

    Raises:
        DataError: The file is missing, no sound file, damaged, empty, or holds values that are not numbers.
    """
    part = _decoded(Path(path), samples, start_s, reading.channel)
    waveform = resampled(torch.from_numpy(part.mono), part.rate, reading.resampling)
    skipped = round(part.before * SAMPLE_RATE / part.rate)
    return waveform[skipped : None if samples is None else skipped + samples]


def check_clip(path: str | Path, samples: int) -> None:
    """Refuse a file whose first clip `read_clip` would refuse; it is decoded, and not resampled.

    Raises:
        DataError: As for `read_clip`.
    """
    _decoded(Path(path), samples, 0.0, "mean")


@dataclass(frozen=True, eq=False)
class _Part:
    mono: NDArray[np.float32]
    rate: int
    before: int
    """Samples in front of the part, which the filter of a resampling needs."""


def _decoded(path: Path, samples: int | None, start_s: float, channel: Channel) -> _Part:
    with _opened(path) as file:
        rate = file.samplerate
        margin = 0 if rate == SAMPLE_RATE else math.ceil(_MARGIN_S * rate)
        begin = min(round(start_s * rate), file.frames - 1)
        first = max(0, begin - margin)
        last = file.frames
        if samples is not None:
            last = min(last, begin + math.ceil(samples * rate / SAMPLE_RATE) + margin)
        if first:
            file.seek(first)
        values: NDArray[np.float32] = file.read(last - first, dtype="float32", always_2d=True)
        is_whole = len(values) == last - first
        stored, found = file.frames, first + len(values)
    if not len(values) or (not is_whole and path.suffix.lower() != ".mp3"):
        # An MP3 tells its length only roughly.
        raise DataError(f"'{path}' is damaged: it breaks off after {found:,} of {stored:,} samples; fetch it again.")
    mono = values[:, 0] if channel == "first" else values.mean(1)
    if not np.isfinite(mono).all():
        raise DataError(f"'{path}' holds values that are not finite numbers; leave it out.")
    return _Part(mono, rate, begin - first)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A sound file with its header read; whatever goes wrong with it in the block is a `DataError` with its name.

    Yields:
        soundfile's object.

    Raises:
        DataError: See `read_clip`.
    """
    soundfile = require("soundfile", extra="audio")
    if not path.is_file():
        raise DataError(f"'{path}' does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty.")
    try:
        file = soundfile.SoundFile(path)
    except Exception as error:  # a damaged header may fail in any way
        raise DataError(
            f"'{path}' is no sound file that can be read here (WAV, FLAC, OGG, MP3, AIFF and others), or is damaged."
        ) from error
    with file:
        if not file.frames:
            raise DataError(f"'{path}' holds no samples.")
        if not RATES[0] <= file.samplerate <= RATES[1]:
            raise DataError(
                f"'{path}' has {file.samplerate:,} samples a second, expected {RATES[0]:,} to {RATES[1]:,}."
            )
        try:
            yield file
        except DataError:
            raise
        except Exception as error:  # a damaged body may fail in any way
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise DataError(f"'{path}' is damaged or cannot be read: {reason}.") from error
