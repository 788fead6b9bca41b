"""Reading sound files of every kind, and refusing what is none by its name in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sound_files import tone, write

from peft_modal.errors import DataError
from peft_modal_audio.features import SAMPLE_RATE
from peft_modal_audio.recordings import Reading, check_clip, duration, read_clip


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        *((".wav", kind) for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "IMA_ADPCM", "ULAW")),
        (".flac", "PCM_24"), (".ogg", "VORBIS"), (".mp3", None), (".aiff", "PCM_16"), (".WAV", "PCM_16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_every_format_gives_the_tone(tmp_path: Path, suffix: str, subtype: str | None, rate: int) -> None:
    path = write(tmp_path / f"tone{suffix}", tone(440, 1.0, rate=rate), rate, subtype)
    found = read_clip(path)
    assert found.dtype == torch.float32
    assert abs(len(found) - SAMPLE_RATE) < 2_000  # some encoders pad
    spectrum = torch.fft.rfft(found[:SAMPLE_RATE]).abs()
    assert abs(int(spectrum.argmax()) * SAMPLE_RATE / min(len(found), SAMPLE_RATE) - 440) < 3
    assert float(found[2000:14_000].abs().max()) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize(("rate", "channels"), [(96_000, 6), (8_000, 2), (44_101, 1)])
def test_channels_are_averaged_or_the_first_is_taken(tmp_path: Path, rate: int, channels: int) -> None:
    path = write(tmp_path / "tone.wav", tone(440, 0.5, rate=rate, channels=channels), rate, "PCM_24")
    mean, first = read_clip(path), read_clip(path, reading=Reading(channel="first"))
    assert torch.allclose(mean, first / channels, atol=1e-5)
    assert abs(len(mean) - SAMPLE_RATE // 2) <= 1


def test_silence_and_a_single_sample_are_sounds(tmp_path: Path) -> None:
    silent = write(tmp_path / "silent.wav", np.zeros(16_000, np.float32))
    assert not bool(read_clip(silent).any())
    single = write(tmp_path / "single.wav", np.full(1, 0.5, np.float32))
    assert read_clip(single).shape == (1,)
    assert read_clip(write(tmp_path / "high.wav", np.full(1, 0.5, np.float32), 96_000)).shape == (1,)


@pytest.mark.parametrize("rate", [16_000, 44_100, 8_000])
def test_a_part_of_a_file_is_that_part_of_the_whole(tmp_path: Path, rate: int) -> None:
    wave = tone(440, 3.0, rate=rate) * np.linspace(0, 1, 3 * rate, dtype=np.float32)
    path = write(tmp_path / "long.wav", wave, rate, "FLOAT")
    whole = read_clip(path)
    for start, samples in ((0.0, 5000), (1.25, 8000), (2.5, 8000), (2.9, 8000)):
        part = read_clip(path, samples=samples, start_s=start)
        expected = whole[round(start * SAMPLE_RATE) : round(start * SAMPLE_RATE) + samples]
        assert abs(len(part) - len(expected)) <= 1
        shorter = min(len(part), len(expected))
        assert torch.allclose(part[:shorter], expected[:shorter], atol=2e-3)


def test_of_an_hour_only_the_part_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8_000, 1) as file:
        for _ in range(60):
            file.write(np.zeros(8_000 * 60, np.float32))
    assert duration(path) == 3600
    asked = []
    read = soundfile.SoundFile.read

    def counting(self: soundfile.SoundFile, frames: int, **options: object) -> object:
        asked.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    assert read_clip(path, samples=16_000, start_s=3000.0).shape == (16_000,)
    assert asked[0] < 10_000


def bad_files(folder: Path) -> dict[str, str]:
    """Names of files that cannot serve, and what the sentence says of each."""
    write(folder / "empty.wav", np.zeros(0, np.float32))
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not a sound\n" * 50)
    (folder / "text.mp3").write_text("not a sound\n" * 50)
    whole = write(folder / "whole.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 48_000))
    (folder / "cut.flac").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    header = write(folder / "header.wav", tone(440)).read_bytes()[:30]
    (folder / "header.wav").write_bytes(header)
    write(folder / "nan.wav", np.where(np.arange(8000) == 10, np.nan, tone(440)).astype(np.float32), subtype="FLOAT")
    write(folder / "slow.wav", tone(440), 100)
    return {
        "empty.wav": "holds no samples", "nothing.wav": "is empty", "text.wav": "is no sound file",
        "text.mp3": "is no sound file", "cut.flac": "is damaged", "header.wav": "is no sound file",
        "nan.wav": "not finite", "slow.wav": "has 100 samples a second", "missing.wav": "does not exist",
    }  # fmt: skip


def test_what_is_no_sound_is_refused_by_name_in_one_sentence(tmp_path: Path) -> None:
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=rf"{re.escape(name)}'.*{message}") as caught:
            read_clip(tmp_path / name, samples=48_000)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match=re.escape(str(caught.value))):
            check_clip(tmp_path / name, 48_000)


def test_a_damaged_end_does_not_matter_where_it_is_not_read(tmp_path: Path) -> None:
    bad_files(tmp_path)
    assert read_clip(tmp_path / "cut.flac", samples=4_000).shape == (4_000,)
