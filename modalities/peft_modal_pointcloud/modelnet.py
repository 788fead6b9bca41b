"""ModelNet40: sampled CAD models of 40 kinds of objects, as PointNet++ and Point-BERT distribute them.

Wu et al., 3D ShapeNets, CVPR 2015, arXiv:1406.5670
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from peft_modal.data.cache import cached_tensors
from peft_modal.data.pickles import read_pickle
from peft_modal.data.progress import progress
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import PositiveInt
from peft_modal_pointcloud.readers import read_cloud
from peft_modal_pointcloud.sampling import farthest_point_sample
from peft_modal_pointcloud.stored import Stored, StoredClouds, check_labels, report_counts

CLASSES: Final = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
"""In label order, which is that of `modelnet40_shape_names.txt`."""
CLASSES_10: Final = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet"
)  # fmt: skip
"""Of the variant with ten classes."""
FOLDER: Final = "modelnet40_normal_resampled"
_PUBLISHED: Final[Mapping[str, int]] = MappingProxyType({"train": 9843, "test": 2468})
_VERSION: Final = 1
"""Of the choice of stored points; to be raised with every change that picks others."""


class ModelNet40(StoredClouds):
    """ModelNet40 from `DIR/modelnet40_normal_resampled`, in either of its forms.

    The text form has `modelnet40_shape_names.txt`, `modelnet40_{train,test}.txt` with a shape's name per line, and
    `<class>/<name>.txt` with 10,000 lines x,y,z,nx,ny,nz. The other is `modelnet40_{train,test}_8192pts_fps.dat`, which
    most results rest on: 8192 of these points per shape, chosen by farthest point sampling and pickled. It is read
    where it is there and `allow_pickle` is set, the text form otherwise. Normals are dropped.

    Args:
        root: That folder, or the one that holds it.
        num_classes: 40, or 10 for the lists that begin with `modelnet10`.
        stored_points: Of the text form, how many points of each file are kept, by farthest point sampling from a random
            one on; done once, then taken from the cache folder (an hour and a gigabyte for all shapes). null keeps all,
            which takes neither.
        allow_pickle: Open `.dat` files, with a reader that does nothing but give arrays.
        options: Arguments of `StoredClouds`.

    Raises:
        ConfigError: `num_classes` is neither.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        num_classes: Literal[40, 10] = 40,
        stored_points: PositiveInt | None = 8192,
        allow_pickle: bool = False,
        **options: Any,  # noqa: ANN401 — typed by `StoredClouds`
    ) -> None:
        super().__init__(root=root, **options)
        if num_classes not in {40, 10}:
            raise ConfigError(f"data.num_classes: {num_classes} is neither 40 nor 10.")
        self.prefix = f"modelnet{num_classes}"
        self.class_names = CLASSES if num_classes == 40 else CLASSES_10
        self.stored_points = stored_points
        self.allow_pickle = allow_pickle

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The classes in label order; see `peft_modal.inspection.classes.NamesClasses`."""
        return CLASSES if arguments["num_classes"] == 40 else CLASSES_10

    def read(self, part: Literal["train", "test"]) -> Stored:
        """The clouds of a split, in the order of its list.

        Raises:
            ConfigError: There is a pickle only, which the user has not allowed to open.
            DataError: There is neither form, or a file cannot serve.
        """
        folder = self.root / FOLDER if (self.root / FOLDER).is_dir() else self.root
        pickled = folder / f"{self.prefix}_{part}_8192pts_fps.dat"
        table = folder / f"{self.prefix}_{part}.txt"
        if pickled.is_file() and (self.allow_pickle or not table.is_file()):
            found, path = _read_pickled(pickled, allowed=self.allow_pickle), pickled
        elif table.is_file():
            found, path = self._read_text(folder, table), table
        else:
            raise DataError(f"'{folder}' has neither '{table.name}' nor '{pickled.name}'; set data.root to it.")
        check_labels(path, found[1], self.num_classes)
        report_counts(path, len(found[1]), _PUBLISHED[part] if self.num_classes == 40 else None)
        return found

    def _read_text(self, folder: Path, table: Path) -> Stored:
        names = _lines(folder / f"{self.prefix}_shape_names.txt")
        if tuple(names) != self.class_names:
            raise DataError(
                f"'{folder / f'{self.prefix}_shape_names.txt'}' does not hold the {self.num_classes} classes in the "
                "order of the alphabet, so its labels are not the published ones."
            )
        shapes = _lines(table)
        # The number is behind the last underscore: `night_stand_0123`.
        classes = [shape.rpartition("_")[0] for shape in shapes]
        for shape, name in zip(shapes, classes, strict=True):
            if name not in names:
                raise DataError(f"'{table}' names '{shape}', and there is no class '{name}'.")
        files = [folder / name / f"{shape}.txt" for shape, name in zip(shapes, classes, strict=True)]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise DataError(f"'{table}' names {len(missing)} shapes without a file, such as '{missing[0]}'.")
        labels = torch.tensor([names.index(name) for name in classes], dtype=torch.int64)
        if self.stored_points is None:
            return _stack(table, [read_cloud(file) for file in files]), labels
        facts = [(file.stem, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = {
            "version": _VERSION,
            "files": hashlib.sha256(repr(facts).encode()).hexdigest(),
            "stored_points": self.stored_points,
        }
        return cached_tensors("modelnet", key, lambda: self._chosen(files))["points"], labels

    def _chosen(self, files: Sequence[Path]) -> dict[str, Tensor]:
        assert self.stored_points is not None
        clouds = []
        with progress(f"{self.prefix}: choosing {self.stored_points} points of each shape", len(files)) as done:
            for file in files:
                clouds.append(_farthest_from_anywhere(file, self.stored_points))
                done(1)
        return {"points": torch.stack(clouds)}


def _farthest_from_anywhere(file: Path, count: int) -> Tensor:
    points = read_cloud(file)
    if len(points) < count:
        raise DataError(f"'{file}' has {len(points)} points, and data.stored_points asks for {count}.")
    start = int(torch.randint(len(points), (1,), generator=seeded("modelnet", file.stem)))
    points = points.roll(-start, 0)
    return points[farthest_point_sample(points[None], count, skip_origin=False)[0]]


def _read_pickled(path: Path, *, allowed: bool) -> Stored:
    content = read_pickle(path, allowed=allowed)
    if not isinstance(content, list | tuple) or len(content) != 2 or not all(isinstance(c, list) for c in content):
        raise DataError(f"'{path}' holds no list of points and list of labels.")
    points, labels = content
    if len(points) != len(labels):
        raise DataError(f"'{path}' holds {len(points)} clouds and {len(labels)} labels.")
    return _stack(path, [as_cloud(path, one) for one in points]), torch.tensor(
        [as_label(path, one) for one in labels], dtype=torch.int64
    )


def as_cloud(path: Path, value: object) -> Tensor:
    """The first three columns of an array of a pickle, (P, 3).

    Raises:
        DataError: It is no table of numbers.
    """
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] < 3 or value.dtype.kind not in "fiu":
        what = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"'{path}' holds a cloud of {what}, expected an array of numbers (points, 3 or more).")
    return torch.from_numpy(value[:, :3].astype(np.float32))


def as_label(path: Path, value: object) -> int:
    """A label of a pickle: a whole number, or an array of one.

    Raises:
        DataError: It is neither.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, int):
        raise DataError(f"'{path}' holds the label {value!r}, expected a whole number.")
    return value


def _stack(path: Path, clouds: Sequence[Tensor]) -> Tensor:
    sizes = {len(cloud) for cloud in clouds}
    if len(sizes) > 1:
        raise DataError(
            f"'{path}' has clouds of {min(sizes)} to {max(sizes)} points, which need a common number: set "
            "data.stored_points."
        )
    return torch.stack(list(clouds)) if clouds else torch.empty(0, 0, 3)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"the list '{path}' does not exist.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' cannot be read as text in UTF-8: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
