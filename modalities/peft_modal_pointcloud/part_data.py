"""Data modules for part segmentation: generated objects, and ShapeNetPart.

A batch is a dict: `points` (B, P, 3) float32, `parts` (B, P) int64 and `category` (B,) int64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch
from peft_modal.data.folder import list_files
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import PARTS, Part, SplitData, require_positive
from peft_modal.errors import ConfigError, DataError, nearest
from peft_modal.ranges import NonNegativeInt, PositiveInt
from peft_modal_heads.parts import PartTable
from peft_modal_pointcloud.augment import build_augment
from peft_modal_pointcloud.data import GENERATOR_VERSION
from peft_modal_pointcloud.part_batches import (
    FixedPartClouds,
    PartClouds,
    PartFiles,
    PartTensors,
    PartTrainBatches,
)
from peft_modal_pointcloud.readers import SUFFIXES
from peft_modal_pointcloud.shapenet_part import PART_NAMES, ShapeNetPartFiles, list_clouds, read_categories
from peft_modal_pointcloud.solids import DOWNSTREAM_FAMILIES, make_solids, observe_parts, part_labels, part_names

PARTS_VERSION = 1
"""Of the parts of generated objects and of their clouds; to be raised with every change that alters one."""


class PartData(SplitData):
    """What data modules for part segmentation share; a subclass says in `load` where the clouds come from.

    The points of each training cloud are drawn anew for every batch, and augmented. `predict` reads files as they are,
    gives the network `num_points` of their points, and finds the part of every point.

    Args:
        batch_size: Clouds per training batch; evaluation takes twice as many.
        num_points: Points per cloud in a batch.
        augment: Names of augmentations for training, applied in this order.
        category: Category of the files that `predict` reads; None for that of the folder that a file lies in.
        seed: Of order, draws and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    draws_with_replacement = False

    def __init__(
        self,
        *,
        class_names: tuple[str, ...],
        batch_size: int,
        num_points: int,
        augment: Sequence[str],
        category: str | None,
        seed: int,
        num_workers: int,
    ) -> None:
        require_positive(num_points=num_points)
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.class_names = class_names
        self.num_points = num_points
        self.augmentation = build_augment(augment)
        self.table = PartTable(class_names)
        if category is not None and category not in self.table.categories:
            raise ConfigError(f"data.category: '{category}' is unknown: {nearest(category, self.table.categories)}")
        self.category = category

    @property
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new cloud before the network sees it."""
        return {"num_points": self.num_points, "normalize": "unit"}

    def train_source(self, samples: PartClouds) -> PartTrainBatches:
        """Batches whose points are drawn anew."""
        return PartTrainBatches(
            samples, self.batch_size, self.num_points, augmentation=self.augmentation, seed=self.seed,
            replacement=self.draws_with_replacement,
        )  # fmt: skip

    def evaluation_set(self, samples: PartClouds) -> Dataset[Batch]:
        """Clouds with a fixed draw of their points."""
        return FixedPartClouds(samples, self.num_points, replacement=self.draws_with_replacement)

    def predict_items(self, path: str | Path) -> tuple[list[Path], DataLoader[Batch]]:
        """The files under a path, and batches of one of them each in the same order; needs no `setup`.

        Args:
            path: A file that `read_cloud` reads, or a folder that is searched with its subfolders.

        Raises:
            DataError: There is no such file, or nothing tells its category.
        """
        files = list(list_files(path, SUFFIXES))
        dataset = PartFiles(files, [self._category_of(file) for file in files], self.num_points)
        return files, DataLoader(dataset, batch_size=1, num_workers=self.num_workers)

    def folder_category(self, folder: str) -> str:
        """The category that a folder's name stands for."""
        return folder

    def _category_of(self, file: Path) -> int:
        name = self.category or self.folder_category(file.absolute().parent.name)
        if name not in self.table.categories:
            raise DataError(
                f"'{file}': its folder names no category; set --data.category to one of "
                f"{', '.join(self.table.categories)}"
            )
        return self.table.categories.index(name)


class PartSolids(PartData):
    """Generated objects whose parts are known: the downstream families of `solids`, none of which is pre-trained on.

    Clouds are turned, stretched, seen from one or two sides, cut and noisy; there is no clutter. Test clouds are the
    same for all seeds. They are kept in the cache folder.

    Args:
        categories: Families; None for all twelve.
        batch_size: Clouds per training batch; evaluation takes twice as many.
        shots: Training clouds per category.
        val_per_category: Validation clouds per category.
        test_per_category: Test clouds per category.
        num_points: Points per cloud in a batch.
        pool_points: Points that each training cloud has in memory; `num_points` of them are drawn for every batch.
        corrupt: Off, the whole surface of every object in its own pose.
        augment: Names of augmentations for training, applied in this order.
        category: Category of the files that `predict` reads; None for that of the folder that a file lies in.
        seed: Of the training and validation clouds, their order, draws and augmentation. Not of the test clouds.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self,
        *,
        categories: list[str] | None = None,
        batch_size: PositiveInt = 16,
        shots: PositiveInt = 20,
        val_per_category: PositiveInt = 10,
        test_per_category: PositiveInt = 20,
        num_points: PositiveInt = 512,
        pool_points: PositiveInt = 768,
        corrupt: bool = True,
        augment: Sequence[str] = ("rotate", "scale", "shift"),
        category: str | None = None,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        families = tuple(DOWNSTREAM_FAMILIES if categories is None else categories)
        if unknown := [name for name in families if name not in DOWNSTREAM_FAMILIES]:
            raise ConfigError(
                *(f"data.categories: unknown '{name}': {nearest(name, DOWNSTREAM_FAMILIES)}" for name in unknown)
            )
        if len(set(families)) < max(1, len(families)):
            raise ConfigError(f"data.categories: {list(families)} should name each category once, and one at least")
        super().__init__(
            class_names=part_names(families), batch_size=batch_size, num_points=num_points, augment=augment,
            category=category, seed=seed, num_workers=num_workers,
        )  # fmt: skip
        require_positive(shots=shots, val_per_category=val_per_category, test_per_category=test_per_category)
        if pool_points < num_points:
            raise ConfigError(f"pool_points is {pool_points}, expected num_points ({num_points}) or more.")
        self.families = families
        self.pool_points = pool_points
        self.corrupt = corrupt
        self.per_category: dict[Part, int] = {
            "train": shots, "val": val_per_category, "test": test_per_category,
        }  # fmt: skip

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The parts of the categories; see `peft_modal.inspection.classes.NamesClasses`."""
        families = arguments["categories"] or DOWNSTREAM_FAMILIES
        return part_names(families) if set(families) <= set(DOWNSTREAM_FAMILIES) else None

    def load(self, part: Part) -> PartTensors:
        """The clouds of a split: from the cache if made before, or generated."""
        seed = 0 if part == "test" else self.seed
        num_points = self.pool_points if part == "train" else self.num_points

        def make() -> dict[str, Tensor]:
            generator = seeded("part solids", *self.families, part, seed)
            solids = make_solids(self.families, self.per_category[part], generator=generator)
            points, parts = observe_parts(
                solids, part_labels(self.families), num_points=num_points, generator=generator, corrupt=self.corrupt
            )
            return {"points": points, "parts": parts, "category": solids.labels}

        key = {
            "generator": GENERATOR_VERSION, "parts": PARTS_VERSION, "families": self.families, "part": part,
            "seed": seed, "per_category": self.per_category[part], "num_points": num_points, "corrupt": self.corrupt,
        }  # fmt: skip
        tensors = cached_tensors("part-solids", key, make)
        return PartTensors(tensors["points"], tensors["parts"], tensors["category"])


class ShapeNetPart(PartData):
    """ShapeNetPart, read from where you keep it (Yi et al., A Scalable Active Framework, SIGGRAPH Asia 2016).

    The folder is `shapenetcore_partanno_segmentation_benchmark_v0_normal`, with `synsetoffset2category.txt`,
    `train_test_split/shuffled_{train,val,test}_file_list.json` and `<synset>/<id>.txt`. As in released code each cloud
    is brought to the unit sphere and its points are drawn with replacement, at test time too; there the draw is fixed.

    Args:
        root: The folder.
        train_on: `train`, and validate on the official validation split; or `trainval` as the published numbers do,
            which leaves nothing to validate on.
        batch_size: Clouds per training batch; evaluation takes twice as many.
        num_points: Points per cloud in a batch.
        augment: Names of augmentations for training, applied in this order: `[scale, shift]` as Point-MAE,
            `[batch_scale_translate, shift]` as IDPT.
        category: Category of the files that `predict` reads; None for that of the folder that a file lies in.
        seed: Of order, draws and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    draws_with_replacement = True

    def __init__(
        self,
        *,
        root: str | Path,
        train_on: Literal["train", "trainval"] = "train",
        batch_size: PositiveInt = 16,
        num_points: PositiveInt = 2048,
        augment: Sequence[str] = ("scale", "shift"),
        category: str | None = None,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            class_names=PART_NAMES, batch_size=batch_size, num_points=num_points, augment=augment, category=category,
            seed=seed, num_workers=num_workers,
        )  # fmt: skip
        self.root = Path(root)
        self.train_on = train_on

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The fifty parts; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return PART_NAMES

    def setup(self, stage: str | None = None) -> None:
        """Find the files.

        Raises:
            DataError: The folder is not of this layout.
        """
        if PARTS[stage] and not self.root.is_dir():
            raise DataError(f"'{self.root}' is not a folder.")
        super().setup(stage)

    def load(self, part: Part) -> ShapeNetPartFiles:
        """The files of a split; none to validate on where these are trained on."""
        parts: tuple[Part, ...] = (part,)
        if self.train_on == "trainval" and part != "test":
            parts = ("train", "val") if part == "train" else ()
        files = [file for each in parts for file in list_clouds(self.root, each)]
        return ShapeNetPartFiles(files, read_categories(self.root))

    def folder_category(self, folder: str) -> str:
        """The category that a folder's name or synset id stands for."""
        return read_categories(self.root).get(folder, folder) if self.root.is_dir() else folder
