"""Drawing a sound for a report: its spectrogram, and a short file to listen to."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from peft_modal.errors import DataError
from peft_modal.extras import require
from peft_modal_audio.features import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE
from peft_modal_audio.recordings import read_clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAYED_S: Final = 3.0
"""Seconds of a clip that can be heard; a page of players of whole clips would have many megabytes."""
_RANGE: Final = 0.99
"""Share of the values that get colours of their own; a few extremes would leave the rest without contrast."""


def render(axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> bytes | None:
    """Draw the `spectrogram` (T, M) of a sample, low sounds below, and return its beginning as a WAV file.

    Args:
        axes: Empty, square.
        sample: One clip, with `waveform` (S,) int16, or the `path` that it was read from and its `start`; `length` are
            the frames that are not padding.
        prediction: Not drawn; the report writes it below.

    Returns:
        The file, or None where there is nothing to hear any more.
    """
    del prediction
    frames = int(sample["length"])
    spectrogram = sample["spectrogram"].float()[: max(1, frames)].T
    low, high = (float(spectrogram.quantile(share)) for share in (1 - _RANGE, _RANGE))
    axes.imshow(spectrogram.numpy(), origin="lower", cmap="magma", vmin=low, vmax=max(high, low + 1e-3), aspect="auto")
    waveform = _waveform(sample, frames)
    return None if waveform is None else _wav(waveform)


def _waveform(sample: Mapping[str, Any], frames: int) -> Tensor | None:
    if "waveform" in sample:
        found: Tensor = sample["waveform"].float() / 32_767
        return found
    if "path" not in sample:
        return None
    samples = min(FRAME_LENGTH + (frames - 1) * FRAME_SHIFT, round(PLAYED_S * SAMPLE_RATE))
    try:
        return read_clip(Path(sample["path"]), samples=samples, start_s=float(sample["start"]))
    except DataError:  # the file has gone since; its picture tells enough
        return None


def _wav(waveform: Tensor) -> bytes:
    """The beginning of a clip with 16 bits, as loud as can be."""
    soundfile = require("soundfile", extra="audio")
    short = waveform[: round(PLAYED_S * SAMPLE_RATE)]
    values: NDArray[np.float32] = (0.9 * short / short.abs().max().clamp(min=1e-4)).numpy()
    file = io.BytesIO()
    soundfile.write(file, values, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
