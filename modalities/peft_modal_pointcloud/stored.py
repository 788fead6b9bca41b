"""The base of benchmarks whose clouds are stored, all with the same number of points."""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_pointcloud.augment import AugmentNames, build_augment, unit
from peft_modal_pointcloud.batches import POOL_POINTS, CloudSet, Normalize, farthest, vote_points
from peft_modal_pointcloud.data import PointClouds
from peft_modal_pointcloud.pools import Draw, PooledBatches, farthest_of_each

_LOG = logging.getLogger(__name__)
Stored = tuple[Tensor, Tensor]
"""Clouds (n, P, 3) float32 as stored, and labels (n,) int64."""


class StoredClouds(PointClouds):
    """What the benchmarks share that Point-MAE's data code reads; a subclass gives `read`, or `load` of its own.

    Training draws `num_points` of a pool that farthest point sampling takes of each cloud in a new order; evaluation
    takes `num_points` by farthest point sampling from the first stored point on. These benchmarks have no validation
    clouds: `val_share` holds some of the training clouds out, which published numbers do not.

    Args:
        root: The folder that holds the benchmark's files.
        batch_size: Clouds per training batch; evaluation takes twice as many.
        num_points: Points per cloud in a batch: 1024, 2048, 4096 or 8192.
        pool_points: Points that these are drawn of; null takes the authors' 1200, 2400, 4800 or 8192, at most what is
            stored.
        draw: `batch`: one draw of places in the pool for all clouds of a batch, as in the authors' code; `cloud`: one
            for each.
        normalize: `unit`: each cloud is centred and scaled to the unit sphere; `none`: coordinates as stored.
        augment: Of training: `rotate`, `scale_translate`, `jitter`, `none`, or a list of them, applied in this order.
            Numbers with and without rotation do not compare.
        val_share: Share of each class's training clouds held out for validation; 0 trains on all, as papers do.
        vote_pool: Keep the pool of each evaluation cloud, so that `task.votes` draws other points for every view.
        vote_augment: Of each of these views, likewise.
        seed: Of the held-out clouds, and of order, draws and augmentation.
        num_workers: Processes that prepare batches, which sampling from thousands of points takes a while for.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        batch_size: PositiveInt = 32,
        num_points: PositiveInt = 1024,
        pool_points: PositiveInt | None = None,
        draw: Draw = "batch",
        normalize: Normalize = "unit",
        augment: AugmentNames = ("scale_translate",),
        val_share: Share = 0.1,
        vote_pool: bool = False,
        vote_augment: AugmentNames = ("scale_translate",),
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_points=num_points,
            normalize=normalize,
            augment=augment,
            seed=seed,
            num_workers=num_workers,
        )
        if num_points not in POOL_POINTS and pool_points is None:
            raise ConfigError(
                f"data.num_points: {num_points} has no pool in the authors' code, expected one of "
                f"{', '.join(map(str, POOL_POINTS))}, or data.pool_points beside it."
            )
        if pool_points is not None and pool_points < num_points:
            raise ConfigError(f"data.pool_points: {pool_points} is below num_points ({num_points}).")
        self.root = Path(root)
        self.pool_points = POOL_POINTS[num_points] if pool_points is None else pool_points
        self.draw: Draw = draw
        self.val_share = val_share
        self.vote_pool = vote_pool
        self.vote_augmentation = build_augment(vote_augment)
        self._training: Stored | None = None

    @staticmethod
    def choose_points(points: Tensor, num_points: int) -> Tensor:
        """Those points (P, 3) of a new file that are looked at, (num_points, 3)."""
        return farthest(points, num_points)

    @property
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new cloud before the network sees it."""
        return {**super().preprocessing, "sampling": "farthest"}

    @abstractmethod
    def read(self, part: Literal["train", "test"]) -> Stored:
        """The clouds of a published split.

        Raises:
            DataError: A file is missing or cannot serve.
        """

    def load(self, part: Part) -> CloudSet:
        """The clouds of a split: as many points as stored for training, `num_points` otherwise.

        Raises:
            DataError: A file cannot serve, or its clouds have fewer points than a batch shall.
        """
        if part == "test":
            clouds, labels = self.prepared(self.read("test"))
            return self.evaluated(clouds, labels)
        if self._training is None:
            self._training = self.prepared(self.read("train"))
        clouds, labels = self._training
        held_out = _held_out(labels, self.val_share, self.seed)
        if part == "val":
            return self.evaluated(clouds[held_out], labels[held_out])
        return CloudSet(clouds[~held_out], labels[~held_out]) if bool(held_out.any()) else CloudSet(clouds, labels)

    def prepared(self, stored: Stored) -> Stored:
        """Checked, and normalised where that is asked for.

        Raises:
            DataError: There are too few points, or coordinates that are no numbers.
        """
        clouds, labels = stored
        if clouds.shape[1] < self.num_points:
            raise DataError(
                f"'{self.root}' has clouds of {clouds.shape[1]} points, and data.num_points asks for {self.num_points}."
            )
        if bad := int((~clouds.isfinite()).flatten(1).any(1).sum()):
            raise DataError(f"'{self.root}' has {bad} of {len(clouds)} clouds with NaN or infinite coordinates.")
        if self.normalize == "unit":
            clouds = torch.stack([unit(cloud) for cloud in clouds])
        return clouds, labels

    def evaluated(self, clouds: Tensor, labels: Tensor) -> CloudSet:
        """Clouds to evaluate on: `num_points` of each, and the pool that votes draw from."""
        if not len(clouds):
            return CloudSet(clouds, labels)
        pools = None
        if self.vote_pool:
            pools = farthest_of_each(clouds, min(vote_points(self.num_points), clouds.shape[1]))
        return CloudSet(farthest_of_each(clouds, self.num_points), labels, pools)

    def train_source(self, samples: CloudSet) -> PooledBatches:
        """Batches drawn of pools."""
        return PooledBatches(
            samples,
            self.batch_size,
            self.num_points,
            pool_points=min(self.pool_points, len(samples.clouds[0])),
            draw=self.draw,
            augmentation=self.augmentation,
            seed=self.seed,
        )

    def no_samples(self, part: Part) -> str:
        """Only validation may be left out."""
        return f"data.val_share is 0, which leaves no {part} clouds."


def report_counts(path: Path, found: int, published: int | None) -> None:
    """Tell in the log that a file has not as many clouds as the published one."""
    if published is not None and found != published:
        _LOG.warning(
            "'%s' has %d clouds, and the published file has %d: results do not compare", path, found, published
        )


def check_labels(path: Path, labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no classes.

    Raises:
        DataError: One is outside of 0..`num_classes` - 1, or there are none.
    """
    if not len(labels):
        raise DataError(f"'{path}' holds no clouds.")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DataError(
            f"'{path}' has labels from {int(labels.min())} to {int(labels.max())}, expected 0..{num_classes - 1}."
        )


def _held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Of each class a share, at least one unless it is 0, chosen by the seed: (n,) bool."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    if share:
        for label in sorted(set(labels.tolist())):
            members = (labels == label).nonzero()[:, 0]
            count = min(max(1, round(share * len(members))), len(members) - 1)
            chosen[members[torch.randperm(len(members), generator=seeded("held out", seed, label))[:count]]] = True
    return chosen
