"""Waveforms mixed in pairs, as AST's authors do (Tokozume et al., ICLR 2018; Zhang et al., ICLR 2018)."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

MIXUP_ALPHA: Final = 10.0
"""Of the Beta distribution, both sides: mostly near one half."""


def mixed_pair(waveform: Tensor, other: Tensor, generator: Generator) -> tuple[Tensor, float]:
    """A waveform (S,) mixed with another of any length, and how much of it is its own; means are taken out.

    Args:
        waveform: Decides the length.
        other: Cut, or padded with zeros.
        generator: Of the share.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    own = float(np.random.default_rng(seed).beta(MIXUP_ALPHA, MIXUP_ALPHA))
    other = other - other.mean()
    other = functional.pad(other[: len(waveform)], (0, max(0, len(waveform) - len(other))))
    mixed = own * (waveform - waveform.mean()) + (1 - own) * other
    return mixed - mixed.mean(), own
