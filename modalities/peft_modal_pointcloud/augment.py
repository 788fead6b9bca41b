"""Normalisation and augmentation of batches of point clouds; every random number comes from the generator passed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from peft_modal.errors import ConfigError, nearest

Augmentation = Callable[[Tensor, Generator], Tensor]
"""Points (B, P, 3) and a CPU generator in, new points (B, P, 3) out."""


def unit(points: Tensor) -> Tensor:
    """A copy of points (..., P, 3) with the mean at the origin and the farthest point at distance 1.

    A cloud whose points all coincide becomes zeros.
    """
    centred = points - points.mean(-2, keepdim=True)
    farthest = centred.norm(dim=-1).amax(-1)[..., None, None]
    return centred / torch.where(farthest > 0, farthest, 1.0)


def scale_translate(
    points: Tensor, generator: Generator, *, scale: tuple[float, float] = (2 / 3, 3 / 2), shift: float = 0.2
) -> Tensor:
    """Scale, then shift each axis of each cloud: p * s + t with s ~ U(scale), t ~ U(-shift, shift).

    The defaults are those of Point-BERT (Yu et al., 2022) and Point-MAE (Pang et al., 2022).

    Args:
        points: (B, P, 3).
        generator: CPU generator.
        scale: Lowest and highest factor.
        shift: Largest shift, in the units of the points.
    """
    low, high = scale
    s, t = torch.rand(2, len(points), 1, 3, generator=generator).to(points)
    return points * (low + (high - low) * s) + (2 * t - 1) * shift


def batch_scale_translate(points: Tensor, generator: Generator) -> Tensor:
    """`scale_translate` by one draw for all clouds (B, P, 3) of the batch, as IDPT's part segmentation does."""
    return scale_translate(points.flatten(0, 1)[None], generator).view_as(points)


def scale(points: Tensor, generator: Generator, *, low: float = 0.8, high: float = 1.25) -> Tensor:
    """Scale each cloud (B, P, 3) by one factor ~ U(low, high); part segmentation of Point-MAE (Pang et al., 2022)."""
    return points * (low + (high - low) * torch.rand(len(points), 1, 1, generator=generator).to(points))


def narrow_scale(points: Tensor, generator: Generator) -> Tensor:
    """Scale each axis of each cloud (B, P, 3) by U(0.9, 1.1); Point-PEFT on scans (Tang et al., AAAI 2024)."""
    return scale_translate(points, generator, scale=(0.9, 1.1), shift=0.0)


def shift(points: Tensor, generator: Generator, *, limit: float = 0.1) -> Tensor:
    """Shift each cloud (B, P, 3) by t ~ U(-limit, limit) per axis; part segmentation of Point-MAE and IDPT."""
    return points + (2 * torch.rand(len(points), 1, 3, generator=generator).to(points) - 1) * limit


def rotate(points: Tensor, generator: Generator) -> Tensor:
    """Turn each cloud (B, P, 3) about y by an angle a ~ U(0, 2 pi).

    p R with the rows (cos a, 0, sin a), (0, 1, 0), (-sin a, 0, cos a), as the data code of Point-MAE does.
    """
    return _turned(points, 2 * math.pi * torch.rand(len(points), generator=generator))


def batch_rotate(points: Tensor, generator: Generator) -> Tensor:
    """`rotate` by one angle for all clouds (B, P, 3) of the batch; Point-PEFT on scans (Tang et al., AAAI 2024)."""
    return _turned(points, 2 * math.pi * torch.rand(1, generator=generator).expand(len(points)))


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    angle = angle.to(points)
    turn = torch.zeros(len(points), 3, 3).to(points)
    turn[:, 0, 0] = turn[:, 2, 2] = angle.cos()
    turn[:, 0, 2], turn[:, 2, 0] = angle.sin(), -angle.sin()
    turn[:, 1, 1] = 1
    return points @ turn


def jitter(points: Tensor, generator: Generator, *, sigma: float = 0.01, limit: float = 0.05) -> Tensor:
    """Add Gaussian noise to every coordinate of points (B, P, 3), clipped at `limit` (Qi et al., PointNet, 2017)."""
    noise = torch.randn(points.shape, generator=generator).to(points)
    return points + (sigma * noise).clamp(-limit, limit)


AugmentNames = Sequence[str] | str
"""One name, `none`, or several in the order in which they are applied."""

AUGMENTATIONS: Mapping[str, Augmentation] = {
    "batch_rotate": batch_rotate,
    "batch_scale_translate": batch_scale_translate,
    "jitter": jitter,
    "narrow_scale": narrow_scale,
    "rotate": rotate,
    "scale": scale,
    "scale_translate": scale_translate,
    "shift": shift,
}


def build_augment(names: AugmentNames) -> Augmentation:
    """The named augmentations one after another, in this order; `none` and an empty list leave the points alone.

    Raises:
        ConfigError: A name is unknown.
    """
    if isinstance(names, str):
        names = [] if names == "none" else [names]
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise ConfigError(*(f"augment: unknown name '{name}': {nearest(name, AUGMENTATIONS)}" for name in unknown))
    return _Chain(tuple(AUGMENTATIONS[name] for name in names))


@dataclass(frozen=True)
class _Chain:
    """A class and not a closure: worker processes receive it pickled."""

    steps: tuple[Augmentation, ...]

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        for step in self.steps:
            points = step(points, generator)
        return points
