"""Clouds in memory and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from peft_modal.data.epochs import Batch
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import ShuffledBatches
from peft_modal.errors import DataError
from peft_modal_pointcloud.augment import Augmentation, unit
from peft_modal_pointcloud.readers import Scan, read_scan
from peft_modal_pointcloud.sampling import farthest_point_sample

Normalize = Literal["unit", "none"]
_POOL_FACTOR = 4


@dataclass(frozen=True, eq=False)
class CloudSet:
    """Clouds of one split in memory."""

    clouds: Sequence[Tensor] | Tensor
    """n clouds (P_i, 3) float32, or one tensor (n, P, 3)."""
    labels: Tensor | None
    """(n,) int64, or None for clouds to pre-train on."""
    pools: Tensor | None = None
    """(n, Q, 3): more points of each evaluation cloud, to draw votes from."""

    def __len__(self) -> int:
        return len(self.clouds)


def read_pool(path: Path, num_points: int, normalize: Normalize) -> Scan:
    """Up to four times `num_points` points of a file.

    Raises:
        DataError: There is one point only.
    """
    scan = read_scan(path, num_points=_POOL_FACTOR * num_points)
    if len(scan.points) < 2:
        raise DataError(f"'{path}' holds a single point, expected a cloud of them.")
    return Scan(unit(scan.points), scan.stored) if normalize == "unit" else scan


POOL_POINTS: Mapping[int, int] = MappingProxyType({1024: 1200, 2048: 2400, 4096: 4800, 8192: 8192})
"""By the points per cloud: of how many they are drawn, in the code that all point transformers share."""


def vote_points(num_points: int) -> int:
    """Size of the pool that votes draw from, as in the authors' evaluation; in proportion for other numbers."""
    return POOL_POINTS.get(num_points, round(num_points * 1200 / 1024))


def farthest(points: Tensor, count: int) -> Tensor:
    """`count` of the points (P, 3) by farthest point sampling, repeated in turn if there are fewer."""
    if len(points) <= count:
        return points[torch.arange(count) % len(points)]
    return points[farthest_point_sample(points[None], count)[0]]


def fixed_subset(points: Tensor, num_points: int) -> Tensor:
    """`num_points` of the points (P, 3), in a draw that depends on P alone; repeated in turn if there are fewer."""
    if len(points) == num_points:
        return points
    order = torch.randperm(len(points), generator=seeded("evaluation", len(points)))
    return points[order[torch.arange(num_points) % len(points)]]


def _redraw(points: Tensor, num_points: int, generator: Generator) -> Tensor:
    """`num_points` of the points (P, 3) at random, with replacement only if there are fewer."""
    if len(points) < num_points:
        return points[torch.randint(len(points), (num_points,), generator=generator)]
    return points[torch.randperm(len(points), generator=generator)[:num_points]]


class TrainBatches(ShuffledBatches):
    """The `BatchSource` of a training set: points of each cloud are drawn anew and augmented."""

    def __init__(
        self, clouds: CloudSet, batch_size: int, num_points: int, *, augmentation: Augmentation, seed: int
    ) -> None:
        super().__init__(clouds.clouds, batch_size, seed=seed)
        self.clouds = clouds
        self.num_points = num_points
        self.augmentation = augmentation

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """Points (B, num_points, 3) and labels of these clouds."""
        points = torch.stack([_redraw(self.clouds.clouds[i], self.num_points, generator) for i in chosen])
        batch = {"points": self.augmentation(points, generator)}
        if self.clouds.labels is not None:
            batch["label"] = self.clouds.labels[chosen]
        return batch


class FixedClouds(Dataset[Batch]):
    """Evaluation clouds as they are."""

    def __init__(self, clouds: CloudSet) -> None:
        self.clouds = clouds

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Batch:
        item = {"points": self.clouds.clouds[index]}
        if self.clouds.labels is not None:
            item["label"] = self.clouds.labels[index]
        if self.clouds.pools is not None:
            item["pool"] = self.clouds.pools[index]
        return item


class Files(Dataset[Batch]):
    """Files to predict on, read one at a time.

    Args:
        files: Paths.
        num_points: Points per cloud.
        normalize: See `PointClouds`.
        choose: Takes that many of a cloud's points.
    """

    def __init__(
        self,
        files: Sequence[Path],
        num_points: int,
        normalize: Normalize,
        choose: Callable[[Tensor, int], Tensor] = fixed_subset,
    ) -> None:
        self.files = files
        self.num_points = num_points
        self.normalize: Normalize = normalize
        self.choose = choose

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        scan = read_pool(self.files[index], self.num_points, self.normalize)
        return {"points": self.choose(scan.points, self.num_points)}
