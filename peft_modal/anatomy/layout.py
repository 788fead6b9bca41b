"""Token layouts, and what a backbone returns and a head reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from torch import Tensor

from peft_modal.errors import ConfigError, nearest

MEAN_OF: Final = "mean."
"""Begins the name of a pooled feature that is an average over named tokens."""


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring tokens; `count` is None for the data tokens, whose number is known only at run time."""

    name: str
    count: int | None


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens stand where in a sequence port.

    Prompts never appear here: they live between a block's input and its output only.
    """

    segments: tuple[Segment, ...]
    body: Literal["grid", "points", "sequence", "windows"]
    """What lies behind the data tokens."""
    prompt_index: int | None = None
    """Where prompts may be inserted; None where they cannot be, for the stated `reason`."""
    reason: str = ""
    repeats_positions: bool = False
    """The network adds positions again before every block, so a surviving prompt's position is added again too."""
    token_dim: int = 1

    def __post_init__(self) -> None:
        if sum(segment.count is None for segment in self.segments) != 1:
            raise ValueError("a token layout has exactly one segment without a count: the data tokens")

    def slice(self, name: str, num_tokens: int) -> slice:
        """Positions of segment `name` in a sequence of `num_tokens` tokens.

        Raises:
            KeyError: The layout has no such segment.
        """
        fixed = sum(segment.count or 0 for segment in self.segments)
        start = 0
        for segment in self.segments:
            count = num_tokens - fixed if segment.count is None else segment.count
            if segment.name == name:
                return slice(start, start + count)
            start += count
        raise KeyError(name)

    @property
    def body_name(self) -> str:
        """Name of the segment that holds the data tokens."""
        return next(segment.name for segment in self.segments if segment.count is None)


@dataclass(frozen=True)
class Features:
    """What a backbone returns.

    `tokens` is (B, N, D), or (B, C, H, W) for convolutional networks; `extras` holds what methods export (a prompt's
    final state, tapped features) and what the modality adds (point centres), each by name.
    """

    tokens: Tensor
    layout: TokenLayout | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def with_extras(self, extras: Mapping[str, Tensor]) -> Features:
        """A copy with more named tensors."""
        return replace(self, extras={**self.extras, **extras})


@dataclass(frozen=True)
class FeatureSpec:
    """What a head may read and how wide it is, known before the first forward pass."""

    width: int
    layout: TokenLayout | None
    exports: Mapping[str, int] = field(default_factory=dict)
    """Tokens that methods hand to the head: name and how many."""
    own: Mapping[str, int] = field(default_factory=dict)
    """Extras of the backbone itself that a pool may list: name and width."""
    default_pool: tuple[str, ...] | None = None
    """What a head reads that is told nothing; None for every single token, every export and `max`."""
    levels: tuple[int, ...] = ()
    """Widths of the feature maps `level.0`, `level.1`, ... among the extras: (B, C, H, W), or (B, G, C)."""

    def available(self) -> dict[str, int]:
        """Name of everything a `pool` can list, with its width."""
        sizes = {"max": self.width, "mean": self.width}
        if self.layout is not None:
            for segment in self.layout.segments:
                if segment.count is not None:
                    sizes[segment.name] = segment.count * self.width
        sizes.update(self.own)
        sizes.update({name: count * self.width for name, count in self.exports.items()})
        return sizes

    def pool_width(self, pool: tuple[str, ...]) -> int:
        """Width of the concatenation of `pool`.

        Raises:
            ConfigError: A name is not available here.
        """
        sizes = self.available()
        for name in pool:
            if name.startswith(MEAN_OF):
                self.averaged(name)
            elif name not in sizes:
                raise ConfigError(f"head.pool: there is no feature '{name}' here; {nearest(name, sizes, count=6)}")
        return sum(sizes.get(name, self.width) for name in pool)

    def averaged(self, name: str) -> tuple[str, ...]:
        """Which tokens `mean.NAME+NAME` averages over: segments and exports, `mean.all` each of them.

        Raises:
            ConfigError: A name is none of these.
        """
        segments = [] if self.layout is None else [segment.name for segment in self.layout.segments]
        known = (*segments, *self.exports)
        wanted = name.removeprefix(MEAN_OF)
        names = known if wanted == "all" else tuple(wanted.split("+"))
        for part in names:
            if part not in known:
                raise ConfigError(
                    f"head.pool: there are no tokens '{part}' in '{name}'; {nearest(part, known, count=6)}"
                )
        return names
