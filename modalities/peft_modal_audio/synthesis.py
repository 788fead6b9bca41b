"""Sounds made by addition of partials and by filtered noise, many at once; and what a room and a microphone add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Generator, Tensor
from torch.nn import functional

from peft_modal_audio.features import SAMPLE_RATE
from peft_modal_audio.vocabulary import METAL, VOWELS, Sound, Span

PARTIALS: Final = 20
CONTROL: Final = 80
"""Samples between two values of what changes slowly: pitch, loudness, formants."""
KNOTS: Final = 64
"""Values along the sounding time that contours and paths of vowels are tabulated at."""
_TOP_HZ: Final = 7_200.0
_BANDWIDTHS: Final = (90.0, 110.0, 170.0)
_BREATH: Final = 0.002
"""Of a formant filter between its peaks, so that nothing is quite silent."""
_SWELL_DB: Final = 30.0


class Synthesiser:
    """Draws clips of classes.

    Args:
        sounds: The classes, in label order.
        samples: Length of a clip.
    """

    def __init__(self, sounds: Sequence[Sound], samples: int) -> None:
        self.samples = samples
        self.steps = -(-samples // CONTROL) + 1
        self.spans = {
            name: torch.tensor([getattr(sound, name) for sound in sounds])
            for name in ("pitch", "depth", "band", "attack", "decay", "tremolo")
        }
        self.numbers = {
            name: torch.tensor([float(getattr(sound, name)) for sound in sounds])
            for name in ("noise", "width", "grains", "swell")
        }
        self.contour = torch.stack([_tabulated(sound.contour, steps=sound.steps) for sound in sounds])
        self.formants = torch.stack([_formants(sound.vowels) for sound in sounds])
        self.is_metal = torch.tensor([sound.metal for sound in sounds])
        self.is_voiced = torch.tensor([bool(sound.vowels) for sound in sounds])
        self.amplitudes = torch.stack([_amplitudes(sound) for sound in sounds])
        harmonics = torch.arange(1, PARTIALS + 1, dtype=torch.float32)
        metal = functional.pad(torch.tensor(METAL), (0, PARTIALS - len(METAL)), value=1.0)
        self.ratios = torch.stack([metal if sound.metal else harmonics for sound in sounds])
        most = max(len(sound.hits) for sound in sounds)
        # What a class has fewer hits of lies behind every clip.
        self.hits = torch.tensor([[*sound.hits, *[9.0] * (most - len(sound.hits))] for sound in sounds])

    def draw(self, labels: Tensor, generator: Generator) -> Tensor:
        """Clips (n, samples) of classes (n,), peaks between 0.25 and 0.8; all random numbers are the generator's."""
        count = len(labels)
        time = torch.arange(self.steps) * (CONTROL / SAMPLE_RATE)
        total = self.samples / SAMPLE_RATE
        sounding = total * (0.65 + 0.3 * torch.rand(count, 1, generator=generator))
        onset = (total - sounding) * torch.rand(count, 1, generator=generator)
        place = (time - onset) / sounding  # (n, steps), 0..1 while it sounds
        loudness = self._loudness(labels, place, sounding, generator)
        waveform = loudness.new_zeros(count, self.samples)
        share = self.numbers["noise"][labels]
        for part, weight in ((self._partials, 1 - share), (self._noise, share)):
            rows = weight.nonzero().flatten()
            if len(rows):
                waveform[rows] += weight[rows, None] * part(labels[rows], place[rows], generator)
        waveform *= self._fine(loudness)
        peak = waveform.abs().amax(1, keepdim=True).clamp(min=1e-6)
        return waveform / peak * (0.25 + 0.55 * torch.rand(count, 1, generator=generator))

    def _drawn(self, name: str, labels: Tensor, generator: Generator) -> Tensor:
        """A value (n, 1) between the ends of each class's span, even on a logarithmic scale; 0 where both are."""
        low, high = self.spans[name][labels].unbind(1)
        share = torch.rand(len(labels), generator=generator)
        return (low.clamp(min=1e-9).log().lerp(high.clamp(min=1e-9).log(), share).exp() * (high > 0))[:, None]

    def _loudness(self, labels: Tensor, place: Tensor, sounding: Tensor, generator: Generator) -> Tensor:
        attack, decay = (self._drawn(name, labels, generator) for name in ("attack", "decay"))
        hits = self.hits[labels]
        jitter = 0.012 * torch.randn(hits.shape, generator=generator) * (hits > 0)
        loudness = torch.zeros_like(place)
        for hit in (hits + jitter).unbind(1):
            since = (place - hit[:, None]) * sounding
            rise = (since / attack).clamp(0, 1)
            loudness = torch.maximum(loudness, rise * torch.exp(-(since - attack).clamp(min=0) / decay))
        inside = ((1 - place) * sounding / 0.03).clamp(0, 1)
        swell = self.numbers["swell"][labels][:, None]
        level = torch.where(swell < 0, -place.clamp(0, 1), place.clamp(0, 1) - 1) * swell.abs()
        rate = self._drawn("tremolo", labels, generator)
        phase = torch.rand(len(labels), 1, generator=generator)
        beat = 0.5 + 0.5 * torch.cos(2 * math.pi * (rate * place * sounding + phase))
        trembling = torch.where(rate > 0, 0.05 + 0.95 * beat, 1.0)
        return loudness * inside * 10 ** (_SWELL_DB / 20 * level) * trembling

    def _partials(self, labels: Tensor, place: Tensor, generator: Generator) -> Tensor:
        count = len(labels)
        along = (place.clamp(0, 1) * (KNOTS - 1)).round().long()
        octaves = self.contour[labels].gather(1, along) * self._drawn("depth", labels, generator)
        drift = 0.01 * torch.randn(count, 2, generator=generator).cumsum(1)
        octaves = octaves + drift[:, :1] + (drift[:, 1:] - drift[:, :1]) * place.clamp(0, 1)
        pitch = self._drawn("pitch", labels, generator) * 2**octaves  # (n, steps)
        turns = self._fine(pitch).double().cumsum(1) / SAMPLE_RATE
        turns = (turns + torch.rand(count, 1, generator=generator)).float()
        formants = self.formants[labels].gather(1, along[..., None].expand(-1, -1, 3))
        formants = formants * (1 + 0.06 * torch.randn(count, 1, 1, generator=generator))
        gains = self._gains(labels, pitch, formants)
        waveform = torch.zeros(count, self.steps - 1, CONTROL)
        rest = functional.pad(turns, (0, waveform[0].numel() - self.samples)).reshape(waveform.shape)
        for rows, is_metal in ((~self.is_metal[labels], False), (self.is_metal[labels], True)):
            if bool(rows.any()):
                waveform[rows] = _added(rest[rows], gains[rows], METAL if is_metal else None)
        waveform = waveform.flatten(1)[:, : self.samples]
        return waveform / waveform.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)

    def _gains(self, labels: Tensor, pitch: Tensor, formants: Tensor) -> Tensor:
        """Amplitude of every partial at every step, (n, PARTIALS, steps)."""
        hertz = self.ratios[labels][..., None] * pitch[:, None]
        gains = self.amplitudes[labels][..., None] * ((_TOP_HZ - hertz) / 500).clamp(0, 1)
        voiced = self.is_voiced[labels]
        gains[voiced] *= _through(hertz[voiced], formants[voiced][:, None])
        return gains

    def _noise(self, labels: Tensor, place: Tensor, generator: Generator) -> Tensor:
        del place
        count = len(labels)
        noise = torch.randn(count, self.samples, generator=generator)
        grains = self.numbers["grains"][labels][:, None]
        noise = noise * (torch.rand(count, self.samples, generator=generator) < grains)
        middle = self._drawn("band", labels, generator)
        hertz = torch.fft.rfftfreq(self.samples, 1 / SAMPLE_RATE).clamp(min=1.0)
        distance = (hertz.log2() - middle.log2()) / self.numbers["width"][labels][:, None]
        shaped = torch.fft.irfft(torch.fft.rfft(noise) * torch.exp(-0.5 * distance.square()), n=self.samples)
        return shaped / shaped.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)

    def _fine(self, slow: Tensor) -> Tensor:
        """A value for each sample (n, samples) of values (n, steps)."""
        fine = functional.interpolate(
            slow[:, None], size=(self.steps - 1) * CONTROL + 1, mode="linear", align_corners=True
        )
        return fine[:, 0, : self.samples]


def with_noise(waveform: Tensor, generator: Generator, *, snr_db: Span) -> Tensor:
    """Clips (n, S) with coloured noise behind.

    Args:
        waveform: Clips.
        generator: Of all random numbers.
        snr_db: Between which numbers of decibels a clip lies above the noise.
    """
    samples = waveform.shape[1]
    hertz = torch.fft.rfftfreq(samples, 1 / SAMPLE_RATE).clamp(min=20.0)
    colour = (hertz / 1000) ** -_between((0.0, 1.0), waveform, generator)
    noise = torch.fft.irfft(torch.fft.rfft(torch.randn(waveform.shape, generator=generator)) * colour, n=samples)
    level = waveform.square().mean(1, keepdim=True).sqrt() * 10 ** (-_between(snr_db, waveform, generator) / 20)
    heard = waveform + noise / noise.square().mean(1, keepdim=True).sqrt() * level
    return heard / heard.abs().amax(1, keepdim=True).clamp(min=1.0)


def in_a_room(waveform: Tensor, generator: Generator, *, decay_s: Span) -> Tensor:
    """Clips (n, S) with reverberation.

    Args:
        waveform: Clips.
        generator: Of all random numbers.
        decay_s: Between which times the room's echo falls by 60 dB.
    """
    count, samples = waveform.shape
    length = round(decay_s[1] * SAMPLE_RATE)
    time = torch.arange(length) / SAMPLE_RATE
    falling = torch.exp(-math.log(1000) * time / _between(decay_s, waveform, generator))
    echo = torch.randn(count, length, generator=generator) * falling
    echo = _between((0.15, 0.6), waveform, generator) * echo / echo.square().sum(1, keepdim=True).sqrt()
    echo[:, 0] += 1.0
    size = 2 ** math.ceil(math.log2(samples + length))  # others take several times as long
    return torch.fft.irfft(torch.fft.rfft(waveform, n=size) * torch.fft.rfft(echo, n=size), n=size)[:, :samples]


def _between(span: Span, of: Tensor, generator: Generator) -> Tensor:
    """A number (n, 1) for each clip."""
    return span[0] + (span[1] - span[0]) * torch.rand(len(of), 1, generator=generator)


def _added(turns: Tensor, gains: Tensor, ratios: Sequence[float] | None) -> Tensor:
    """Sum of partials (n, steps, CONTROL).

    Args:
        turns: Phase of the lowest, in turns.
        gains: Amplitudes (n, PARTIALS, steps + 1), between which loudness moves evenly.
        ratios: Frequencies over the lowest; None for harmonics.
    """
    angle = 2 * math.pi * (turns % 1.0)
    ramp = torch.arange(CONTROL) / CONTROL
    total = torch.zeros_like(angle)
    # sin(k x) = 2 cos(x) sin((k - 1) x) - sin((k - 2) x)
    factor, before, current = 2 * angle.cos(), torch.zeros_like(angle), angle.sin()
    for number in range(PARTIALS if ratios is None else len(ratios)):
        if ratios is not None:
            current = torch.sin(2 * math.pi * ((ratios[number] * turns) % 1.0))
        elif number:
            before, current = current, torch.addcmul(-before, factor, current)
        start, end = gains[:, number, :-1, None], gains[:, number, 1:, None]
        if bool((start != 0).any()):
            total.addcmul_(current, start + (end - start) * ramp)
    return total


def _tabulated(knots: Sequence[float], *, steps: bool) -> Tensor:
    """A course at KNOTS values along the sounding time."""
    values = torch.tensor([*knots], dtype=torch.float32)
    if len(values) == 1:
        return values.expand(KNOTS)
    if steps:
        return values[(torch.arange(KNOTS) * len(values) // KNOTS)]
    return functional.interpolate(values[None, None], size=KNOTS, mode="linear", align_corners=True)[0, 0]


def _formants(vowels: str) -> Tensor:
    """Three formants at KNOTS values along the sounding time, in hertz, gliding between vowels."""
    path = torch.tensor([VOWELS[vowel] for vowel in vowels or "a"])
    return torch.stack([_tabulated(of.tolist(), steps=False) for of in path.unbind(1)], dim=1)


def _amplitudes(sound: Sound) -> Tensor:
    numbers = torch.arange(1, PARTIALS + 1, dtype=torch.float32)
    amplitudes = numbers**-sound.tilt
    if sound.odd:
        amplitudes = amplitudes * (numbers % 2)
    if sound.metal:
        amplitudes = amplitudes * (numbers <= len(METAL))
    # What nobody hears is not computed.
    return amplitudes * (amplitudes > 1e-3)


def _through(hertz: Tensor, formants: Tensor) -> Tensor:
    """What a vocal tract makes of partials: of their frequencies (n, K, steps) and of (n, 1, steps, 3) formants."""
    gain = torch.full_like(hertz, _BREATH)
    for number, width in enumerate(_BANDWIDTHS):
        gain = gain + 0.6**number / (1 + ((hertz - formants[..., number]) / width).square())
    return gain
