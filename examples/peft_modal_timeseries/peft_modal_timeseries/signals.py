"""Generated series of several families, each with random phase, rate, amplitude, time warp, lag and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Generator, Tensor

Family = Callable[[Tensor, Generator], Tensor]
"""Values at the times u (T,) between 0 and 1."""

GENERATOR_VERSION: Final = 1
"""To be raised with every change that alters a series."""
NOISE = 0.35


def make_signals(
    families: Sequence[str], per_family: int, *, length: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """`per_family` series of each family, family after family.

    Returns:
        Series (n, 2, length) float32 and the index of each one's family (n,) int64.
    """
    series = [_observe(FAMILIES[name], length, generator) for name in families for _ in range(per_family)]
    return torch.stack(series), torch.arange(len(families)).repeat_interleave(per_family)


def _observe(family: Family, length: int, generator: Generator) -> Tensor:
    """One series as two sensors record it (2, T): the second later, mixed with a slow drift, with its own noise."""
    margin = length // 8
    time = torch.linspace(0.0, 1.0, length + margin)
    knots = torch.randn(3, generator=generator) * torch.tensor([0.03, 0.02, 0.01])
    warped = time + sum(a * torch.sin(math.pi * (k + 1) * time) for k, a in enumerate(knots))
    latent = family(warped, generator)
    latent = (latent - latent.mean()) / latent.std().clamp_min(1e-6)
    lag = int(torch.randint(margin, (1,), generator=generator))
    drift = _uniform(generator, -1, 1) * torch.linspace(-1, 1, length)
    first = latent[margin:]
    second = _sign(generator) * (0.8 * latent[margin - lag : margin - lag + length] + 0.6 * drift)
    clean = torch.stack([first, second])
    return clean + NOISE * torch.randn(2, length, generator=generator)


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1, generator=generator))


def _sign(generator: Generator) -> float:
    return 1.0 if float(torch.rand(1, generator=generator)) < 0.5 else -1.0


def _phase(u: Tensor, generator: Generator, low: float, high: float) -> Tensor:
    """Turns of an oscillation with a random rate between `low` and `high` and a random start."""
    return _uniform(generator, low, high) * u + _uniform(generator, 0, 1)


def _sine(turns: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * turns)


def _pulses(u: Tensor, centres: Tensor, width: float) -> Tensor:
    return torch.exp(-0.5 * ((u[:, None] - centres) / width) ** 2).sum(1)


def _autoregressive(noise: Tensor, *coefficients: float) -> Tensor:
    values: list[float] = [0.0] * len(coefficients)
    for shock in noise.tolist():
        values.append(shock + sum(c * values[-1 - i] for i, c in enumerate(coefficients)))
    return torch.tensor(values[len(coefficients) :])


# Families to adapt to.


def _modulated(u: Tensor, g: Generator) -> Tensor:
    return _sine(_phase(u, g, 12, 20)) * (1 + 0.9 * _sine(_phase(u, g, 1.5, 3)))


def _switching(u: Tensor, g: Generator) -> Tensor:
    at, rate = _uniform(g, 0.3, 0.7), _uniform(g, 5, 9)
    turns = torch.where(u < at, rate * u, rate * at + 2.2 * rate * (u - at))
    return _sine(turns + _uniform(g, 0, 1))


def _burst(u: Tensor, g: Generator) -> Tensor:
    centre, width = _uniform(g, 0.25, 0.75), _uniform(g, 0.05, 0.1)
    return _sine(_phase(u, g, 12, 20)) * torch.exp(-0.5 * ((u - centre) / width) ** 2)


def _regular_spikes(u: Tensor, g: Generator) -> Tensor:
    count = int(torch.randint(7, 11, (1,), generator=g))
    return _pulses(u, (torch.arange(count) + _uniform(g, 0, 1)) / count, 0.01)


def _irregular_spikes(u: Tensor, g: Generator) -> Tensor:
    count = int(torch.randint(7, 11, (1,), generator=g))
    return _pulses(u, torch.rand(count, generator=g), 0.01)


def _charging(u: Tensor, g: Generator) -> Tensor:
    return 1 - torch.exp(-5 * _phase(u, g, 4, 7).frac())


def _heartbeat(u: Tensor, g: Generator) -> Tensor:
    turns = _phase(u, g, 4, 7).frac()
    return torch.exp(-0.5 * ((turns - 0.3) / 0.03) ** 2) + 0.4 * torch.exp(-0.5 * ((turns - 0.6) / 0.08) ** 2)


def _volatile(u: Tensor, g: Generator) -> Tensor:
    at, width = _uniform(g, 0.15, 0.55), _uniform(g, 0.2, 0.4)
    loud = ((u > at) & (u < at + width)).float()
    return torch.randn(len(u), generator=g) * (0.2 + 1.5 * loud)


# Families to learn from first.


def _oscillation(u: Tensor, g: Generator) -> Tensor:
    return _sine(_phase(u, g, 3, 14))


def _damped(u: Tensor, g: Generator) -> Tensor:
    return _sine(_phase(u, g, 6, 16)) * torch.exp(-_uniform(g, 2, 5) * u)


def _chirp(u: Tensor, g: Generator) -> Tensor:
    return _sine(_phase(u, g, 3, 6) + _uniform(g, 4, 8) * u**2)


def _beat(u: Tensor, g: Generator) -> Tensor:
    return _sine(_phase(u, g, 6, 16)) + _sine(_phase(u, g, 6, 16))


def _square(u: Tensor, g: Generator) -> Tensor:
    return torch.sign(_sine(_phase(u, g, 2, 9)))


def _sawtooth(u: Tensor, g: Generator) -> Tensor:
    return _phase(u, g, 2, 9).frac() * _sign(g)


def _steps(u: Tensor, g: Generator) -> Tensor:
    edges = torch.rand(6, generator=g)
    return ((u[:, None] > edges) * torch.randn(6, generator=g)).sum(1)


def _bumps(u: Tensor, g: Generator) -> Tensor:
    return _pulses(u, torch.rand(4, generator=g), _uniform(g, 0.015, 0.05))


def _walk(u: Tensor, g: Generator) -> Tensor:
    return torch.randn(len(u), generator=g).cumsum(0)


def _resonance(u: Tensor, g: Generator) -> Tensor:
    radius, angle = _uniform(g, 0.93, 0.99), 2 * math.pi * _uniform(g, 0.02, 0.08)
    return _autoregressive(torch.randn(len(u), generator=g), 2 * radius * math.cos(angle), -(radius**2))


DOWNSTREAM: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "burst": _burst,
        "charging": _charging,
        "heartbeat": _heartbeat,
        "irregular_spikes": _irregular_spikes,
        "modulated": _modulated,
        "regular_spikes": _regular_spikes,
        "switching": _switching,
        "volatile": _volatile,
    }
)
PRETRAIN: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "beat": _beat,
        "bumps": _bumps,
        "chirp": _chirp,
        "damped": _damped,
        "oscillation": _oscillation,
        "resonance": _resonance,
        "sawtooth": _sawtooth,
        "square": _square,
        "steps": _steps,
        "walk": _walk,
    }
)
FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({**DOWNSTREAM, **PRETRAIN})
