"""Generated sounds: the same for a seed, other classes to pre-train on, and real structure in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from peft_modal_audio.features import SAMPLE_RATE
from peft_modal_audio.sounds import Sounds
from peft_modal_audio.synthesis import Synthesiser, in_a_room, with_noise
from peft_modal_audio.vocabulary import DOWNSTREAM, PRETRAIN, Sound

SMALL: dict[str, Any] = {"shots": 2, "val_per_class": 1, "test_per_class": 2, "batch_size": 6}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def clips(sound: Sound, count: int = 6, *, seed: int = 0) -> Tensor:
    synthesiser = Synthesiser((sound,), 20_000)
    return synthesiser.draw(torch.zeros(count, dtype=torch.int64), Generator().manual_seed(seed))


def named(name: str) -> Sound:
    return next(sound for sound in DOWNSTREAM if sound.name == name)


def centroid(clip: Tensor) -> Tensor:
    """Middle frequency of stretches of an eighth of a second, in hertz, where it sounds."""
    frames = clip.unfold(0, 2048, 1024)
    power = torch.fft.rfft(frames * torch.hann_window(2048)).abs().square()
    hertz = torch.fft.rfftfreq(2048, 1 / SAMPLE_RATE)
    loud = power.sum(1) > 0.02 * power.sum(1).max()
    return ((power * hertz).sum(1) / power.sum(1))[loud]


@pytest.mark.parametrize("sounds", [DOWNSTREAM, PRETRAIN], ids=["downstream", "pretrain"])
def test_every_class_sounds_and_stays_within_range(sounds: tuple[Sound, ...]) -> None:
    synthesiser = Synthesiser(sounds, 20_000)
    labels = torch.arange(len(sounds)).repeat(2)
    state = torch.random.get_rng_state()
    found = synthesiser.draw(labels, Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert bool(found.isfinite().all())
    peaks = found.abs().amax(1)
    assert bool(((peaks > 0.24) & (peaks < 0.81)).all())
    assert torch.equal(found, synthesiser.draw(labels, Generator().manual_seed(1)))
    assert not torch.equal(found, synthesiser.draw(labels, Generator().manual_seed(2)))
    assert not torch.allclose(found[: len(sounds)], found[len(sounds) :])


def test_classes_of_pretraining_are_others() -> None:
    def kind(sound: Sound) -> tuple[object, ...]:
        return tuple(value for name, value in vars(sound).items() if name != "name")

    names = [sound.name for sound in (*DOWNSTREAM, *PRETRAIN)]
    kinds = [kind(sound) for sound in (*DOWNSTREAM, *PRETRAIN)]
    assert len(set(names)) == len(names) == 21 + 66
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(("name", "sign"), [("rising sweep", 1), ("falling sweep", -1)])
def test_sweeps_go_where_they_are_said_to(name: str, sign: int) -> None:
    for clip in clips(named(name)):
        course = centroid(clip)
        assert sign * float(course[-3:].mean() - course[:3].mean()) > 50


def test_a_tone_has_the_pitch_that_was_drawn() -> None:
    found = clips(Sound("tone", pitch=(440, 440), tilt=6.0), count=4)
    for clip in found:
        spectrum = torch.fft.rfft(clip).abs()
        peak = float(spectrum.argmax()) * SAMPLE_RATE / len(clip)
        assert 440 * 2**-0.06 < peak < 440 * 2**0.06  # pitches drift by some cents


def test_rhythms_speed_up_or_slow_down() -> None:
    for name, sign in (("speeding clicks", -1), ("slowing clicks", 1)):
        for clip in clips(named(name)):
            loud = clip.square().unfold(0, 80, 80).mean(1)
            is_rising = (loud[4:] > 3 * loud[:-4]) & (loud[4:] > 0.05 * loud.max())
            rises = (is_rising[1:] & ~is_rising[:-1]).nonzero().flatten()
            rises = rises[torch.cat([torch.tensor([True]), rises.diff() > 8])]
            assert len(rises) >= 4
            gaps = rises.diff()
            assert sign * int(gaps[-1] - gaps[0]) > 0


def test_noise_has_the_level_and_a_room_an_echo() -> None:
    clean = clips(named("flute"), count=4)
    noisy = with_noise(clean * 0.1, Generator().manual_seed(0), snr_db=(10.0, 10.0))
    difference = noisy - clean * 0.1
    level = 20 * torch.log10((0.1 * clean).square().mean(1).sqrt() / difference.square().mean(1).sqrt())
    assert torch.allclose(level, torch.tensor(10.0), atol=0.1)
    click = torch.zeros(1, 20_000)
    click[0, 1000] = 1.0
    wet = in_a_room(click, Generator().manual_seed(0), decay_s=(0.3, 0.3))[0]
    assert not bool((wet[:990].abs() > 1e-5).any())
    early, late = wet[1001:2000].square().mean(), wet[1000 + 4000 : 1000 + 4800].square().mean()
    assert 45 < float(10 * torch.log10(early / late)) < 60  # 60 dB in 0.3 s


def test_the_test_clips_are_the_same_for_all_seeds_and_others_are_not() -> None:
    one, other = Sounds(seed=0, **SMALL), Sounds(seed=1, **SMALL)
    one.setup(None)
    other.setup(None)
    assert torch.equal(one._sets["test"].waveforms, other._sets["test"].waveforms)
    assert not torch.equal(one._sets["train"].waveforms, other._sets["train"].waveforms)
    batch = next(iter(one.test_dataloader()))
    assert batch["spectrogram"].shape == (12, 128, 128)
    assert batch["waveform"].dtype == torch.int16
    assert one.class_counts() == [2] * 21


def test_the_cache_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Sounds(**SMALL)
    first.setup("test")
    monkeypatch.setattr(Synthesiser, "draw", None)
    again = Sounds(**SMALL)
    again.setup("test")
    assert torch.equal(first._sets["test"][3]["spectrogram"], again._sets["test"][3]["spectrogram"])


def test_training_batches_are_masked_by_the_seed_and_keep_their_clips() -> None:
    data = Sounds(mask_frequency=20, mask_time=30, **SMALL)
    data.setup("fit")
    source = data.train_source(data._sets["train"])
    batch = source.batch(0, 0)
    assert torch.equal(batch["spectrogram"], source.batch(0, 0)["spectrogram"])
    hidden = data.front.normalised(torch.zeros(()))
    assert bool((batch["spectrogram"] == hidden).any())
    plain = Sounds(**SMALL)
    plain.setup("fit")
    assert torch.equal(plain.train_source(plain._sets["train"]).batch(0, 0)["waveform"], batch["waveform"])


def test_batches_of_pretraining_are_drawn_anew_and_normalised() -> None:
    data = Sounds(split="pretrain", steps=3, **{**SMALL, "batch_size": 48})
    data.setup("fit")
    source = data.train_source(data._sets["train"])
    assert len(source) == 3
    batches = [source.batch(0, 0), source.batch(0, 1), source.batch(1, 0)]
    assert torch.equal(batches[0]["spectrogram"], source.batch(0, 0)["spectrogram"])
    assert len({tuple(batch["label"].tolist()) for batch in batches}) == 3
    spectrogram = torch.cat([batch["spectrogram"] for batch in batches])
    # AudioSet's statistics are near enough.
    assert abs(float(spectrogram.mean())) < 0.15
    assert float(spectrogram.std()) == pytest.approx(0.5, abs=0.15)
