"""Few-shot classification: some classes, some training clouds of each, ten folds whose mean is reported.

The protocol is that of Sharma and Kaul (Self-Supervised Few-Shot Learning on Point Clouds, NeurIPS 2020,
arXiv:2009.14168), as Point-BERT and Point-MAE apply it: 5 or 10 ways, 10 or 20 shots, 20 test clouds of each class.

Fold and seed are one number unless told otherwise, so that `compare --seeds 10` trains on ten folds and its table has
their mean and deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from peft_modal.data.pickles import read_pickle
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_pointcloud.augment import AugmentNames
from peft_modal_pointcloud.batches import CloudSet
from peft_modal_pointcloud.data import PointClouds, Solids
from peft_modal_pointcloud.modelnet import as_cloud, as_label
from peft_modal_pointcloud.solids import DOWNSTREAM_FAMILIES
from peft_modal_pointcloud.stored import Stored, StoredClouds, check_labels

_TEST_PER_CLASS: Final = 20


class ModelNetFewShot(StoredClouds):
    """Few-shot ModelNet40: `DIR/<way>way_<shot>shot/<fold>.pkl`, or `DIR/<way>way<shot>shot`, as Point-BERT made it.

    A file holds the training and test clouds of a fold with labels from 0 to way - 1. There are no validation clouds.

    Args:
        root: The folder that holds these (`ModelNetFewshot`).
        way: Classes.
        shot: Training clouds of each.
        fold: 0 to 9; null takes that of the seed's number.
        outputs: Classes that the head distinguishes; the authors leave 40 for every `way`. null: `way`.
        allow_pickle: Open the file, with a reader that does nothing but give arrays.
        seed: Of order, draws and augmentation, and the fold where that is null.
        options: Arguments of `StoredClouds`.

    Raises:
        ConfigError: `outputs` is below `way`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        way: PositiveInt = 5,
        shot: PositiveInt = 10,
        fold: NonNegativeInt | None = None,
        outputs: PositiveInt | None = None,
        allow_pickle: bool = False,
        val_share: Share = 0.0,
        seed: int = 0,
        **options: Any,  # noqa: ANN401 — typed by `StoredClouds`
    ) -> None:
        super().__init__(root=root, val_share=val_share, seed=seed, **options)
        self.way = way
        self.shot = shot
        self.fold = seed if fold is None else fold
        self.allow_pickle = allow_pickle
        self.class_names = _numbered(way, outputs)

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Numbers of the classes; see `peft_modal.inspection.classes.NamesClasses`."""
        return _numbered(arguments["way"], arguments["outputs"])

    def read(self, part: Literal["train", "test"]) -> Stored:
        """The clouds of a fold.

        Raises:
            ConfigError: The user has not allowed to open pickles.
            DataError: There is no such file, or it is of another form.
        """
        names = (f"{self.way}way_{self.shot}shot", f"{self.way}way{self.shot}shot")
        folder = next((self.root / name for name in names if (self.root / name).is_dir()), None)
        if folder is None:
            raise DataError(
                f"'{self.root}' has no folder '{names[0]}' (nor '{names[1]}'); set data.root, way and shot."
            )
        path = folder / f"{self.fold}.pkl"
        content = read_pickle(path, allowed=self.allow_pickle)
        items = content.get(part) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, tuple | list) and len(item) >= 2 for item in items):
            raise DataError(f"'{path}' holds no list '{part}' of clouds with their labels.")
        labels = torch.tensor([as_label(path, item[1]) for item in items], dtype=torch.int64)
        check_labels(path, labels, self.way)
        expected = self.shot if part == "train" else _TEST_PER_CLASS
        counts = labels.bincount(minlength=self.way).tolist()
        if set(counts) != {expected}:
            raise DataError(f"'{path}' has {counts} {part} clouds of its classes, expected {expected} of each.")
        clouds = [as_cloud(path, item[0]) for item in items]
        if len({len(cloud) for cloud in clouds}) > 1:
            raise DataError(f"'{path}' has clouds with different numbers of points.")
        return torch.stack(clouds), labels


class SolidsFewShot(PointClouds):
    """Few-shot `solids`: `way` of the twelve classes, `shot` new training clouds of each, 20 of the fixed test clouds.

    Which classes, and their training and validation clouds, follow from the fold alone; all folds draw their test
    clouds from the one test set of `solids`.

    Args:
        way: Classes, 2 to 12.
        shot: Training clouds of each.
        fold: Any number; null takes that of the seed.
        batch_size: Clouds per training batch; evaluation takes twice as many.
        val_per_class: Validation clouds of each class; the protocol has none (0).
        num_points: Points per cloud in a batch.
        pool_points: Points that each training cloud has in memory; `num_points` of them are drawn for every batch.
        augment: Of training: `rotate`, `scale_translate`, `jitter`, `none`, or a list of them, applied in this order.
        seed: Of order, draws and augmentation, and the fold where that is null.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        way: PositiveInt = 5,
        shot: PositiveInt = 10,
        fold: NonNegativeInt | None = None,
        batch_size: PositiveInt = 32,
        val_per_class: NonNegativeInt = 0,
        num_points: PositiveInt = 512,
        pool_points: PositiveInt = 768,
        augment: AugmentNames = ("rotate",),
        seed: int = 0,
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
        if not 2 <= way <= len(DOWNSTREAM_FAMILIES):
            raise ConfigError(f"data.way: {way} is outside of 2..{len(DOWNSTREAM_FAMILIES)}, the classes of 'solids'.")
        self.way = way
        self.fold = seed if fold is None else fold
        self.val_per_class = val_per_class
        order = torch.randperm(len(DOWNSTREAM_FAMILIES), generator=seeded("few-shot classes", self.fold))
        self.chosen: list[int] = order[:way].tolist()
        self.class_names = tuple(DOWNSTREAM_FAMILIES[label] for label in self.chosen)
        self.solids = Solids(
            shots=shot,
            val_per_class=max(1, val_per_class),
            num_points=num_points,
            pool_points=pool_points,
            seed=self.fold,
        )

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """As many names as ways; which, the fold decides. See `peft_modal.inspection.classes.NamesClasses`."""
        return _numbered(arguments["way"], None)

    def load(self, part: Part) -> CloudSet:
        """The clouds of the fold's classes, in the order of the labels."""
        if part == "val" and self.val_per_class == 0:
            return CloudSet(torch.empty(0, self.num_points, 3), torch.empty(0, dtype=torch.int64))
        everything = self.solids.load(part)
        assert everything.labels is not None and isinstance(everything.clouds, Tensor)  # noqa: PT018 — one statement
        places = []
        for label in self.chosen:
            members = (everything.labels == label).nonzero()[:, 0]
            if part == "test":
                drawn = torch.randperm(len(members), generator=seeded("few-shot test", self.fold, label))
                members = members[drawn[:_TEST_PER_CLASS]]
            places.append(members)
        labels = torch.cat([torch.full_like(members, label) for label, members in enumerate(places)])
        return CloudSet(everything.clouds[torch.cat(places)], labels)

    def no_samples(self, part: Part) -> str:
        """Only validation may be left out."""
        return f"data.val_per_class is 0, which leaves no {part} clouds."


def _numbered(way: int, outputs: int | None) -> tuple[str, ...]:
    """Names for the ways, and for outputs beyond them that never occur.

    Raises:
        ConfigError: There are fewer outputs than ways.
    """
    if outputs is not None and outputs < way:
        raise ConfigError(f"data.outputs: {outputs} is below way ({way}).")
    unused = range(way, outputs or way)
    return (*(f"class {label}" for label in range(way)), *(f"unused {label}" for label in unused))
