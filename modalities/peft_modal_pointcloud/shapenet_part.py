"""ShapeNetPart on disk (Yi et al., SIGGRAPH Asia 2016), in the layout that PointNet++ published with normals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import torch

from peft_modal.data.splits import Part
from peft_modal.errors import DataError
from peft_modal_pointcloud.augment import unit
from peft_modal_pointcloud.part_batches import PartCloud

COUNTS: Final[Mapping[str, int]] = MappingProxyType({
    "Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2, "Lamp": 4,
    "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3,
})  # fmt: skip
"""Parts of each category; they are numbered through in this order."""

PART_NAMES: Final = tuple(f"{name}/{part}" for name, count in COUNTS.items() for part in range(count))
"""The parts have no published names, so they are counted within their category."""

CATEGORIES: Final = tuple(COUNTS)
_TABLE: Final = "synsetoffset2category.txt"
_COLUMNS: Final = 7


def read_categories(root: Path) -> dict[str, str]:
    """The category of every synset id.

    Raises:
        DataError: The table is missing or names another category.
    """
    table = root / _TABLE
    if not table.is_file():
        raise DataError(f"'{table}' does not exist; data.root is the folder with {_TABLE} and train_test_split.")
    found = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        name, _, synset = line.strip().partition("\t" if "\t" in line else " ")
        if not name:
            continue
        if name not in COUNTS:
            raise DataError(f"'{table}' names the category '{name}'; known: {', '.join(CATEGORIES)}.")
        found[synset.strip()] = name
    return found


def list_clouds(root: Path, part: Part) -> list[Path]:
    """The files of a split, by category and name.

    Raises:
        DataError: A list is missing or damaged, or names a file that does not exist.
    """
    synsets = read_categories(root)
    table = root / "train_test_split" / f"shuffled_{part}_file_list.json"
    if not table.is_file():
        raise DataError(f"'{table}' does not exist.")
    try:
        names = json.loads(table.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"'{table}' cannot be read as JSON: {error}") from error
    found = []
    for name in names:
        # shape_data/<synset>/<id>
        parts = str(name).split("/")
        if len(parts) != 3 or parts[1] not in synsets:
            raise DataError(f"'{table}' has the entry '{name}', expected shape_data/<synset>/<id> of a known synset.")
        path = root / parts[1] / f"{parts[2]}.txt"
        if not path.is_file():
            raise DataError(f"'{path}' does not exist, but '{table}' names it.")
        found.append((CATEGORIES.index(synsets[parts[1]]), path))
    return [path for _, path in sorted(found)]


def read_parts(path: Path, category: str) -> PartCloud:
    """Points, without their normals, and parts of a file; centred and scaled to the unit sphere.

    Raises:
        DataError: It is no table of seven columns of numbers, or a label is no part of the category.
    """
    try:
        values = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise DataError(f"'{path}' cannot be read: {error}") from error
    if values.shape[1] != _COLUMNS or not np.isfinite(values).all():
        raise DataError(
            f"'{path}' has shape {values.shape}, expected rows of x, y, z, a normal and a part, all finite."
        )
    index = CATEGORIES.index(category)
    first = sum(list(COUNTS.values())[:index])
    parts = torch.from_numpy(values[:, -1]).long()
    if not len(parts) or int(parts.min()) < first or int(parts.max()) >= first + COUNTS[category]:
        raise DataError(
            f"'{path}' has parts {sorted(set(parts.tolist()))}, and those of '{category}' are {first} to "
            f"{first + COUNTS[category] - 1}"
        )
    # One byte for a part: all clouds together stay below 600 MB.
    return PartCloud(unit(torch.from_numpy(values[:, :3].astype(np.float32))), parts.to(torch.uint8), index)


class ShapeNetPartFiles:
    """The clouds of a split; each file is read once by every process that needs it.

    Args:
        files: Paths `<synset>/<id>.txt`.
        synsets: The category of every synset id.
    """

    def __init__(self, files: list[Path], synsets: Mapping[str, str]) -> None:
        self.files = files
        self.synsets = dict(synsets)
        self._read: dict[int, PartCloud] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> PartCloud:
        if index not in self._read:
            path = self.files[index]
            self._read[index] = read_parts(path, self.synsets[path.parent.name])
        return self._read[index]
