"""Clouds whose points have parts, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from peft_modal.data.epochs import Batch
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import ShuffledBatches
from peft_modal.errors import DataError
from peft_modal_pointcloud.augment import Augmentation, unit
from peft_modal_pointcloud.batches import fixed_subset
from peft_modal_pointcloud.readers import read_cloud


@dataclass(frozen=True, eq=False)
class PartCloud:
    """One cloud."""

    points: Tensor
    """(P, 3) float32."""
    parts: Tensor
    """The part of each point, (P,) integers of any size."""
    category: int

    def take(self, index: Tensor) -> PartCloud:
        """Some of its points."""
        return PartCloud(self.points[index], self.parts[index], self.category)

    def sample(self) -> Batch:
        """As an element of a batch."""
        return {"points": self.points, "parts": self.parts.long(), "category": self.category}


class PartClouds(Protocol):
    """The clouds of a split."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> PartCloud:
        """One of them, with any number of points."""


@dataclass(frozen=True, eq=False)
class PartTensors:
    """Clouds of one length in memory."""

    points: Tensor
    """(n, P, 3) float32."""
    parts: Tensor
    """(n, P) int64."""
    categories: Tensor
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> PartCloud:
        return PartCloud(self.points[index], self.parts[index], int(self.categories[index]))


def drawn(cloud: PartCloud, num_points: int, generator: Generator, *, replacement: bool) -> PartCloud:
    """`num_points` of the points at random; with replacement where that is asked for, or where there are fewer."""
    count = len(cloud.points)
    if replacement or count < num_points:
        return cloud.take(torch.randint(count, (num_points,), generator=generator))
    return cloud.take(torch.randperm(count, generator=generator)[:num_points])


class PartTrainBatches(ShuffledBatches):
    """The `BatchSource` of a training set: points of each cloud are drawn anew, with their parts, and augmented."""

    def __init__(
        self, clouds: PartClouds, batch_size: int, num_points: int, *, augmentation: Augmentation, seed: int,
        replacement: bool,
    ) -> None:  # fmt: skip
        super().__init__(clouds, batch_size, seed=seed)
        self.clouds = clouds
        self.num_points = num_points
        self.augmentation = augmentation
        self.replacement = replacement

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """Points (B, num_points, 3), their parts (B, num_points), and the categories (B,)."""
        clouds = [
            drawn(self.clouds[i], self.num_points, generator, replacement=self.replacement) for i in chosen
        ]  # fmt: skip
        return {
            "points": self.augmentation(torch.stack([cloud.points for cloud in clouds]), generator),
            "parts": torch.stack([cloud.parts for cloud in clouds]).long(),
            "category": torch.tensor([cloud.category for cloud in clouds], dtype=torch.int64),
        }


class FixedPartClouds(Dataset[Batch]):
    """Evaluation clouds: the same points in every evaluation, in a draw that depends on the cloud's place alone.

    Released code draws anew each time, so that its test figure moves by itself.

    Args:
        clouds: Of a split.
        num_points: Points per cloud.
        replacement: See `drawn`; clouds of `num_points` are taken as they are.
    """

    def __init__(self, clouds: PartClouds, num_points: int, *, replacement: bool) -> None:
        self.clouds = clouds
        self.num_points = num_points
        self.replacement = replacement

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Batch:
        cloud = self.clouds[index]
        if len(cloud.points) != self.num_points:
            generator = seeded("part evaluation", index)
            cloud = drawn(cloud, self.num_points, generator, replacement=self.replacement)
        return cloud.sample()


class PartFiles(Dataset[Batch]):
    """Files to predict on: the network sees `num_points` of their points, and every point is a query.

    Args:
        files: Paths.
        categories: Of each file.
        num_points: Points for the network.
    """

    def __init__(self, files: Sequence[Path], categories: Sequence[int], num_points: int) -> None:
        self.files = files
        self.categories = categories
        self.num_points = num_points

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        points = read_cloud(self.files[index])
        if len(points) < 2:
            raise DataError(f"'{self.files[index]}' holds a single point, expected a cloud of them.")
        points = unit(points)
        return {
            "points": fixed_subset(points, self.num_points),
            "queries": points,
            "category": self.categories[index],
        }
