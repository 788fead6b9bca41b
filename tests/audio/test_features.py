"""The front end: equal to transformers' feature extractor, and to its cards at the edges."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from peft_modal.errors import DataError
from peft_modal_audio.features import SAMPLE_RATE, FrontEnd, Masks, log_mel, resampled

FRONT = FrontEnd(frames=120, mels=128, statistics="audioset")


def noise(samples: int, *, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(samples, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("seconds", [0.4, 1.2, 3.0])
def test_it_is_the_feature_extractor_of_transformers(seconds: float) -> None:
    from transformers import ASTFeatureExtractor

    waveform = noise(round(seconds * SAMPLE_RATE))
    extract = ASTFeatureExtractor(max_length=FRONT.frames)
    expected = extract(waveform.numpy().astype(np.float32), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    # Its path without torchaudio differs by 5e-5.
    assert torch.allclose(FRONT.spectrogram(waveform), expected["input_values"][0], atol=1e-4)


def test_silence_is_quieter_than_padding() -> None:
    found = FRONT.unnormalised(torch.zeros(8000))
    assert torch.allclose(found[:48], torch.tensor(math.log(2**-23)), atol=1e-4)
    assert bool((found[48:] == 0).all())
    assert FRONT.spectrogram(torch.zeros(8000))[-1, 0].item() == pytest.approx(0.467, abs=1e-3)


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 401])
def test_any_length_gives_a_frame(samples: int) -> None:
    assert log_mel(noise(samples), 64).shape == (1, 64)
    assert FRONT.spectrogram(noise(samples)).shape == (120, 128)


def test_the_samples_of_a_front_end_fill_its_frames() -> None:
    assert len(log_mel(noise(FRONT.samples), 32)) == FRONT.frames
    assert len(log_mel(noise(FRONT.samples - 1), 32)) == FRONT.frames - 1


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 44_101, 48_000, 95_999, 96_000, 192_000])
def test_a_tone_of_any_rate_keeps_its_pitch(rate: int) -> None:
    t = torch.arange(rate) / rate
    started = time.perf_counter()
    found = resampled(torch.sin(2 * math.pi * 1000 * t), rate)
    assert time.perf_counter() - started < 5  # 44,101 Hz takes torchaudio over a minute
    assert abs(len(found) - SAMPLE_RATE) <= 1
    middle = found[4000:12_000]
    expected = torch.sin(2 * math.pi * 1000 * (torch.arange(4000, 12_000) / SAMPLE_RATE))
    # 95,999 Hz is taken for 96,000, so that after a second the phase is off by a sixteenth.
    assert torch.allclose(middle, expected, atol=0.1 if rate % 2 else 0.02)


@pytest.mark.parametrize("rate", [0, -1, 999, 2_000_000])
def test_rates_of_no_recording_are_refused(rate: int) -> None:
    with pytest.raises(DataError, match="sample rate"):
        resampled(noise(100), rate)


@pytest.mark.parametrize(("when", "value"), [("before", FRONT.normalised(torch.zeros(())).item()), ("after", 0.0)])
def test_masks_hide_a_band_and_a_stretch_and_follow_from_the_generator(when: str, value: float) -> None:
    masks = Masks(frequency=40, time=50, when=when)  # type: ignore[arg-type]
    waveform = noise(FRONT.samples)
    plain = FRONT.spectrogram(waveform)
    state = torch.random.get_rng_state()
    log_mels = FRONT.unnormalised(waveform)
    found = [masks.normalised(log_mels, FRONT, Generator().manual_seed(seed)) for seed in range(8)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(found[0], masks.normalised(log_mels, FRONT, Generator().manual_seed(0)))
    hidden = [one != plain for one in found]
    assert any(bool(one.all(0).any()) for one in hidden), "whole mel bins"
    assert any(bool(one.all(1).any()) for one in hidden), "whole frames"
    for one, where in zip(found, hidden, strict=True):
        assert torch.allclose(one[where], torch.tensor(value), atol=1e-6)
        assert int(where.all(0).sum()) < 40
        assert int(where.all(1).sum()) < 50


def test_without_masks_nothing_changes() -> None:
    waveform = noise(FRONT.samples)
    found = Masks().normalised(FRONT.unnormalised(waveform), FRONT, Generator().manual_seed(0))
    assert torch.equal(found, FRONT.spectrogram(waveform))
