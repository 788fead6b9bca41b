"""Data modules for point clouds: generated solids, and files in folders.

A batch is a dict: `points` (B, P, 3) float32 and, where there are labels, `label` (B,) int64.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.folder import FolderIndex, list_files, scan_folder
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import PARTS, Part, SplitData, require_positive
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_pointcloud.augment import AugmentNames, build_augment
from peft_modal_pointcloud.batches import (
    CloudSet,
    Files,
    FixedClouds,
    Normalize,
    TrainBatches,
    farthest,
    fixed_subset,
    read_pool,
    vote_points,
)
from peft_modal_pointcloud.readers import SUFFIXES, Scan
from peft_modal_pointcloud.solids import DOWNSTREAM_FAMILIES, PRETRAIN_FAMILIES, make_solids, observe

GENERATOR_VERSION = 1
"""Of the generated solids; to be raised with every change that alters a cloud."""


LARGE_SCAN = 50_000
"""Points of a file from which on the log tells that most are left out."""
_LOG = logging.getLogger(__name__)


class PointClouds(SplitData):
    """What all point-cloud data modules share; a subclass says in `load` where the clouds come from.

    Training batches are shuffled, the last incomplete one is dropped (a smaller data set is one batch), the points of
    each cloud are drawn anew and augmented. All of it follows from the seed, the epoch and the place of the batch.

    Args:
        batch_size: Clouds per training batch; evaluation takes twice as many.
        num_points: Points per cloud in a batch.
        normalize: `unit`: each cloud is centred and scaled to the unit sphere; `none`: coordinates as stored.
        augment: Of training: `rotate`, `scale_translate`, `jitter`, `none`, or a list of them, applied in this order.
        seed: Of order, draws and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_points: int,
        normalize: Normalize,
        augment: AugmentNames,
        seed: int,
        num_workers: int,
    ) -> None:
        require_positive(batch_size=batch_size, num_points=num_points)
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if normalize not in {"unit", "none"}:
            raise ConfigError(f"normalize is '{normalize}', expected 'unit' or 'none'.")
        self.num_points = num_points
        self.normalize: Normalize = normalize
        self.augmentation = build_augment(augment)
        self.vote_augmentation = build_augment("scale_translate")

    @property
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new cloud before the network sees it."""
        return {"num_points": self.num_points, "normalize": self.normalize}

    def load(self, part: Part) -> CloudSet:
        """The clouds of a split: any number of points for training, `num_points` otherwise."""
        raise NotImplementedError

    def train_source(self, samples: CloudSet) -> BatchSource:
        """Batches whose points are drawn anew."""
        return TrainBatches(samples, self.batch_size, self.num_points, augmentation=self.augmentation, seed=self.seed)

    def evaluation_set(self, samples: CloudSet) -> FixedClouds:
        """Clouds as they are."""
        return FixedClouds(samples)

    @staticmethod
    def choose_points(points: Tensor, num_points: int) -> Tensor:
        """Those points (P, 3) of a new file that are looked at, (num_points, 3)."""
        return fixed_subset(points, num_points)

    def plain_training_set(self, samples: CloudSet) -> FixedClouds:
        """Clouds of `num_points` points each, a fixed draw of those in memory."""
        clouds = [fixed_subset(points, self.num_points) for points in samples.clouds]
        return FixedClouds(CloudSet(clouds, samples.labels))

    def class_counts(self) -> list[int]:
        """Training clouds of each class; see `CountsClasses`.

        Raises:
            DataError: They have no labels.
        """
        labels = self._sets["train"].labels
        if labels is None:
            raise DataError(f"{type(self).__name__} has no labels here, so its classes cannot be counted.")
        return torch.bincount(labels, minlength=self.num_classes).tolist()

    def predict_items(self, path: str | Path) -> tuple[list[Path], DataLoader[Batch]]:
        """The files under a path, and batches {"points"} of them in the same order; needs no `setup`.

        Args:
            path: A file that `read_cloud` reads, or a folder that is searched with its subfolders.

        Raises:
            DataError: There is no such file. A damaged one is reported when its batch is read.
        """
        files = list_files(path, SUFFIXES)
        dataset = Files(files, self.num_points, self.normalize, self.choose_points)
        return list(files), DataLoader(dataset, batch_size=2 * self.batch_size, num_workers=self.num_workers)

    def vote(self, batch: Batch, index: int) -> Batch:
        """View `index` of an evaluation batch, for predictions averaged over several (Qi et al., NeurIPS 2017).

        Where the batch has a `pool` (B, Q, 3), `num_points` of it are drawn, the same for all clouds of the batch; the
        view is then augmented, by default scaled and shifted at random. It depends on nothing but the index and the
        number of points.
        """
        points = batch["points"]
        generator = seeded("vote", index, points.shape[1])
        if "pool" in batch:
            pool = batch["pool"]
            points = pool[:, torch.randperm(pool.shape[1], generator=generator)[: points.shape[1]].to(pool.device)]
        view = self.vote_augmentation(points.cpu(), generator).to(points.device)
        return {**batch, "points": view}


class Solids(PointClouds):
    """Generated solids as a scanner would see them: cluttered, turned, half hidden, cut and noisy.

    `downstream` has 12 classes with few training clouds and one test set for all seeds; it is kept in the cache
    folder. `pretrain` has 18 other families without labels, two observations of each training solid.

    Args:
        batch_size: Clouds per training batch; evaluation takes twice as many.
        shots: Training clouds per class (downstream).
        val_per_class: Validation clouds per class.
        test_per_class: Test clouds per class.
        num_points: Points per cloud in a batch.
        pool_points: Points that each training cloud has in memory; `num_points` of them are drawn for every batch.
        per_family: Solids per family (pretrain).
        augment: Of training: `rotate`, `scale_translate`, `jitter`, `none`, or a list of them, applied in this order.
        seed: Of the training and validation clouds, their order, draws and augmentation. Not of the test clouds.
        split: Which families.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 32,
        shots: PositiveInt = 30,
        val_per_class: PositiveInt = 10,
        test_per_class: PositiveInt = 40,
        num_points: PositiveInt = 512,
        pool_points: PositiveInt = 768,
        per_family: PositiveInt = 300,
        augment: AugmentNames = ("rotate",),
        seed: int = 0,
        split: Literal["downstream", "pretrain"] = "downstream",
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_points=num_points,
            normalize="unit",
            augment=augment,
            seed=seed,
            num_workers=num_workers,
        )
        require_positive(shots=shots, val_per_class=val_per_class, test_per_class=test_per_class, per_family=per_family)
        if pool_points < num_points:
            raise ConfigError(f"pool_points is {pool_points}, expected num_points ({num_points}) or more.")
        if split not in {"downstream", "pretrain"}:
            raise ConfigError(f"split is '{split}', expected 'downstream' or 'pretrain'.")
        self.is_labelled = split == "downstream"
        self.class_names = self.class_names_without_data({"split": split})
        self.pool_points = pool_points
        self.per_class: dict[Part, int] = {
            "train": shots if self.is_labelled else per_family,
            "val": val_per_class,
            "test": test_per_class,
        }

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The families of a split; see `peft_modal.inspection.classes.NamesClasses`."""
        return DOWNSTREAM_FAMILIES if arguments["split"] == "downstream" else PRETRAIN_FAMILIES

    def load(self, part: Part) -> CloudSet:
        """Clouds (n, P, 3) of a split: from the cache if made before, or generated."""
        seed = 0 if part == "test" else self.seed
        num_points = self.pool_points if part == "train" else self.num_points
        observations = 2 if part == "train" and not self.is_labelled else 1
        per_class = self.per_class[part]

        def make() -> dict[str, Tensor]:
            generator = seeded("solids", *self.class_names, part, seed)
            solids = make_solids(self.class_names, per_class, generator=generator)
            clouds = [observe(solids, num_points=num_points, generator=generator) for _ in range(observations)]
            return {"points": torch.cat(clouds), "label": solids.labels.repeat(observations)}

        if not self.is_labelled:
            return CloudSet(make()["points"], None)
        key = {
            "generator": GENERATOR_VERSION,
            "families": self.class_names,
            "part": part,
            "seed": seed,
            "per_class": per_class,
            "num_points": num_points,
        }
        tensors = cached_tensors("solids", key, make)
        return CloudSet(tensors["points"], tensors["label"])


class Folder(PointClouds):
    """Files in `DIR/{train,val,test}/<class>/...` or `DIR/<class>/...`, or those a CSV `path,label[,split]` names.

    Every file is read once. A training cloud keeps up to four times `num_points` points, however many more the file
    has, of which each batch draws anew (with replacement if the file has fewer than `num_points`); evaluation takes a
    fixed draw that depends on nothing but the file.

    Args:
        root: The folder or the CSV file.
        batch_size: Clouds per training batch; evaluation takes twice as many.
        num_points: Points per cloud in a batch.
        normalize: `unit`: each cloud is centred and scaled to the unit sphere; `none`: coordinates as stored.
        augment: Of training: `rotate`, `scale_translate`, `jitter`, `none`, or a list of them, applied in this order.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        vote_pool: Keep more points of each evaluation cloud (1200 for 1024, in proportion for other numbers, chosen
            by farthest point sampling), so that `task.votes` draws other points for every vote.
        seed: Of the held-out files, and of order, draws and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        batch_size: PositiveInt = 32,
        num_points: PositiveInt = 1024,
        normalize: Normalize = "unit",
        augment: AugmentNames = ("scale_translate",),
        val_share: Share = 0.1,
        test_share: Share = 0.2,
        vote_pool: bool = False,
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
        self.root = Path(root)
        self.val_share = val_share
        self.test_share = test_share
        self.vote_pool = vote_pool
        self._index: FolderIndex | None = None
        self._has_told = False

    def setup(self, stage: str | None = None) -> None:
        """Find the files, and read those of the splits that a stage needs.

        Raises:
            DataError: The folder cannot serve, or a file cannot be read.
        """
        if self._index is None and PARTS[stage]:
            self._index = scan_folder(
                self.root, suffixes=SUFFIXES, val_share=self.val_share, test_share=self.test_share, seed=self.seed
            )
            self.class_names = self._index.class_names
        super().setup(stage)

    def _tell_large(self, paths: list[Path], scans: list[Scan]) -> None:
        """Once, that of long scans most points are never looked at."""
        large = [(scan.stored, len(scan.points), path) for path, scan in zip(paths, scans, strict=True)]
        large = [item for item in large if item[0] >= LARGE_SCAN]
        if large and not self._has_told:
            self._has_told = True
            stored, kept, path = max(large)
            _LOG.warning(
                "scans are sampled while they are read: %d of the %d points of '%s' are kept, and as many of "
                "every other",
                kept,
                stored,
                path,
            )

    def no_samples(self, part: Part) -> str:
        """Where files of a split come from."""
        return f"'{self.root}' has no {part} files: add '{part}/<class>/', or set a {part}_share."

    def load(self, part: Part) -> CloudSet:
        """Read the files of a split."""
        assert self._index is not None
        items = {"train": self._index.train, "val": self._index.val, "test": self._index.test}[part]
        scans = [read_pool(item.path, self.num_points, self.normalize) for item in items]
        self._tell_large([item.path for item in items], scans)
        clouds = [scan.points for scan in scans]
        pools = None
        if part != "train":
            if self.vote_pool and clouds:
                pools = torch.stack([farthest(points, vote_points(self.num_points)) for points in clouds])
            clouds = [fixed_subset(points, self.num_points) for points in clouds]
        return CloudSet(clouds, torch.tensor([item.label for item in items], dtype=torch.int64), pools)
