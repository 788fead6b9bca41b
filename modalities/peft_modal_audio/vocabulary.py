"""Which sounds there are: what sets one generated class apart from another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

Span = tuple[float, float]
"""What a number is drawn between, evenly on a logarithmic scale where it is a frequency or a time."""
VOWELS: Final = {
    "a": (730.0, 1090.0, 2440.0), "e": (530.0, 1840.0, 2480.0), "i": (270.0, 2290.0, 3010.0),
    "o": (570.0, 840.0, 2410.0), "u": (300.0, 870.0, 2240.0),
}  # fmt: skip
"""Formants in hertz (Peterson and Barney, 1952); the lips' path between vowels is what a class may be made of."""
METAL: Final = (1.0, 2.76, 5.40, 8.93, 1.48, 3.9)
"""Partials of a struck bar and of a bell, over the lowest."""


@dataclass(frozen=True)
class Sound:
    """A class. Times are shares of the sounding time, which differs from clip to clip as onset and loudness do."""

    name: str
    pitch: Span = (120.0, 480.0)
    """Of the lowest partial, in hertz."""
    contour: tuple[float, ...] = (0.0,)
    """Knots of the pitch over the sounding time, in octaves times `depth`."""
    depth: Span = (1.0, 1.0)
    steps: bool = False
    """Whether the pitch jumps from knot to knot instead of gliding."""
    tilt: float = 1.0
    """Partial k has the amplitude k**-tilt."""
    odd: bool = False
    """Only odd partials, as in a clarinet."""
    metal: bool = False
    """Partials of a bar in place of harmonics."""
    vowels: str = ""
    """Path of the formants; empty for none."""
    noise: float = 0.0
    """Share of noise."""
    band: Span = (200.0, 4000.0)
    """Middle of the noise's band, in hertz."""
    width: float = 4.0
    """Deviation of that band, in octaves."""
    grains: float = 1.0
    """Share of the noise's samples that are not zero."""
    hits: tuple[float, ...] = (0.0,)
    """When the sound begins, each time anew."""
    attack: Span = (0.01, 0.03)
    """Seconds."""
    decay: Span = (3.0, 6.0)
    """Seconds until a hit has fallen to 1/e."""
    swell: float = 0.0
    """Loudness over the sounding time: grows (1) or shrinks (-1) by 30 dB."""
    tremolo: Span = (0.0, 0.0)
    """Rate of a deep tremolo in hertz; 0 for none."""


_STRUCK: Final[dict[str, Any]] = {"attack": (0.002, 0.005), "decay": (0.04, 0.08)}
_NOISY: Final[dict[str, Any]] = {"noise": 1.0, "width": 4.0}

DOWNSTREAM: Final = (
    # Instruments: timbre, and how they are played.
    Sound("flute", pitch=(350, 900), tilt=2.2, attack=(0.05, 0.12), noise=0.08),
    Sound("clarinet", pitch=(150, 450), tilt=0.9, odd=True, attack=(0.03, 0.08)),
    Sound("plucked string", pitch=(110, 400), tilt=1.1, attack=(0.002, 0.005), decay=(0.15, 0.35)),
    # Of one timbre, apart in time only.
    Sound("rising sweep", contour=(0, 1), depth=(0.8, 2.0)),
    Sound("falling sweep", contour=(0, -1), depth=(0.8, 2.0), pitch=(240, 960)),
    Sound("hump", contour=(0, 1, 0), depth=(0.8, 1.8)),
    Sound("dip", contour=(0, -1, 0), depth=(0.8, 1.8), pitch=(240, 960)),
    Sound("slow alarm", contour=(0, 1, 0, 1), depth=(0.4, 0.6), steps=True, pitch=(300, 700)),
    Sound("fast alarm", contour=(0, 1) * 5, depth=(0.4, 0.6), steps=True, pitch=(300, 700)),
    # Percussion: one hit, or its rhythm.
    Sound("bell", pitch=(250, 700), metal=True, tilt=0.6, attack=(0.001, 0.003), decay=(0.3, 0.7)),
    Sound("drum", pitch=(60, 140), contour=(1, 0, 0, 0, 0, 0), depth=(0.6, 1.0), tilt=2.5, noise=0.25, band=(200, 900),
          hits=(0.0, 0.5), attack=(0.002, 0.004), decay=(0.08, 0.16)),
    Sound("speeding clicks", hits=(0.0, 0.32, 0.56, 0.73, 0.85, 0.93), band=(900, 3500), **_NOISY, **_STRUCK),
    Sound("slowing clicks", hits=(0.0, 0.07, 0.15, 0.27, 0.44, 0.68), band=(900, 3500), **_NOISY, **_STRUCK),
    Sound("gallop", hits=(0.0, 0.12, 0.4, 0.52, 0.8, 0.92), band=(900, 3500), **_NOISY, **_STRUCK),
    # Noises.
    Sound("hiss", noise=1.0, band=(3500, 6500), width=0.7),
    Sound("wind", noise=1.0, band=(250, 700), width=0.8, tremolo=(1.2, 2.2)),
    Sound("crackle", noise=1.0, band=(800, 4000), width=3.0, grains=0.003),
    # Vowels, alone and as paths both ways.
    Sound("ah", pitch=(90, 260), tilt=0.8, vowels="a"),
    Sound("oo", pitch=(90, 260), tilt=0.8, vowels="u"),
    Sound("ay", pitch=(90, 260), tilt=0.8, vowels="ai"),
    Sound("ya", pitch=(90, 260), tilt=0.8, vowels="ia"),
)  # fmt: skip
"""The 21 classes of the task."""

_SOURCES: Final = (
    Sound("pure", pitch=(200, 1600), tilt=6.0),
    Sound("saw", pitch=(90, 500), tilt=0.7),
    Sound("square", pitch=(200, 800), tilt=1.4, odd=True),
    Sound("bars", pitch=(150, 500), tilt=0.2, metal=True),
    Sound("low noise", noise=1.0, band=(150, 500), width=0.5),
    Sound("high noise", noise=1.0, band=(1500, 5000), width=0.4),
    Sound("e", pitch=(90, 260), tilt=0.8, vowels="e"),
    Sound("o to e", pitch=(90, 260), tilt=0.8, vowels="oe"),
)
_COURSES: Final[dict[str, dict[str, Any]]] = {
    "held": {},
    "growing": {"swell": 1.0},
    "shrinking": {"swell": -1.0},
    "trembling": {"tremolo": (4.0, 7.0)},
    "fluttering": {"tremolo": (13.0, 20.0)},
    "thrice": {"hits": (0.0, 0.34, 0.67), "decay": (0.08, 0.15)},
    "step up": {"contour": (0.0, 1.0), "depth": (0.3, 0.8), "steps": True},
    "step down": {"contour": (0.0, -1.0), "depth": (0.3, 0.8), "steps": True},
    "wavering": {"contour": (0.0, 1.0, 0.0, -1.0) * 2 + (0.0,), "depth": (0.15, 0.35)},
}


def _pretraining() -> tuple[Sound, ...]:
    """Every source with every course; noise has no pitch that could move."""
    made = []
    for source in _SOURCES:
        for name, course in _COURSES.items():
            if not (source.noise and "contour" in course):
                made.append(replace(source, name=f"{source.name}, {name}", **course))
    return tuple(made)


PRETRAIN: Final = _pretraining()
"""The 66 classes of pre-training, none of them one of the task's."""
