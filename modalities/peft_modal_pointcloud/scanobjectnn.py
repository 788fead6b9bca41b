"""ScanObjectNN: real scans of 15 kinds of objects.

Uy et al., Revisiting Point Cloud Classification, ICCV 2019, arXiv:1908.04616
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import torch

from peft_modal.errors import DataError
from peft_modal.extras import require
from peft_modal.ranges import PositiveInt
from peft_modal_pointcloud.augment import AugmentNames
from peft_modal_pointcloud.batches import Normalize
from peft_modal_pointcloud.stored import Stored, StoredClouds, check_labels, report_counts

Variant = Literal["obj_bg", "obj_only", "pb_t50_rs"]
CLASSES: Final = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
"""In label order."""


@dataclass(frozen=True)
class _Files:
    folder: str
    suffix: str
    counts: Mapping[str, int]
    """Clouds of the published files."""


_VARIANTS: Final[Mapping[Variant, _Files]] = MappingProxyType(
    {
        "obj_bg": _Files("main_split", "objectdataset.h5", {"train": 2309, "test": 581}),
        "obj_only": _Files("main_split_nobg", "objectdataset.h5", {"train": 2309, "test": 581}),
        "pb_t50_rs": _Files(
            "main_split", "objectdataset_augmentedrot_scale75.h5", {"train": 11416, "test": 2882}
        ),
    }
)  # fmt: skip


class ScanObjectNN(StoredClouds):
    """ScanObjectNN's main split: `DIR/main_split[_nobg]/{training,test}_objectdataset[_augmentedrot_scale75].h5`.

    Published work uses coordinates as they are stored, so `normalize` is `none`. Figures with rotation (IDPT, ACT) lie
    some points above those without (Point-MAE, Point-BERT): never mix them.

    Args:
        root: The folder that holds `main_split`, or the one above it (`h5_files`).
        variant: `obj_bg` with background, `obj_only` without, `pb_t50_rs` moved, turned and scaled: the hardest.
        num_points: All 2048, or 1024 as in Point-BERT.
        options: Arguments of `StoredClouds`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        variant: Variant = "pb_t50_rs",
        num_points: PositiveInt = 2048,
        normalize: Normalize = "none",
        augment: AugmentNames = ("rotate",),
        **options: Any,  # noqa: ANN401 — typed by `StoredClouds`
    ) -> None:
        super().__init__(root=root, num_points=num_points, normalize=normalize, augment=augment, **options)
        self.variant: Variant = variant
        self.class_names = CLASSES

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The fifteen; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return CLASSES

    def read(self, part: Literal["train", "test"]) -> Stored:
        """`data` (n, 2048, 3) and `label` (n,) of a file, bit for bit.

        Raises:
            DataError: The file is missing or cannot serve.
            MissingExtraError: h5py is not installed.
        """
        files = _VARIANTS[self.variant]
        path = self._folder(files.folder) / f"{'training' if part == 'train' else 'test'}_{files.suffix}"
        if not path.is_file():
            raise DataError(f"'{path}' does not exist; data.variant '{self.variant}' is read from it.")
        clouds, labels = _read_h5(path)
        check_labels(path, labels, len(CLASSES))
        report_counts(path, len(labels), files.counts[part])
        return clouds, labels

    def _folder(self, name: str) -> Path:
        for folder in (self.root / name, self.root / "h5_files" / name):
            if folder.is_dir():
                return folder
        raise DataError(
            f"'{self.root}' has no folder '{name}' (nor 'h5_files/{name}'); set data.root to the folder that holds it."
        )


def _read_h5(path: Path) -> Stored:
    h5py = require("h5py", extra="pointcloud")
    try:
        with h5py.File(path, "r") as file:
            found = {key: np.asarray(file[key][()]) for key in ("data", "label") if key in file}
            keys = ", ".join(sorted(file))
    except Exception as error:  # h5py lets every kind of error out of a damaged file
        raise DataError(f"'{path}' cannot be read as HDF5: {' '.join(str(error).split())}") from error
    missing = [key for key in ("data", "label") if key not in found]
    if missing:
        raise DataError(f"'{path}' has no '{missing[0]}', it holds {keys or 'nothing'}; expected 'data' and 'label'.")
    data, label = found["data"], found["label"]
    if data.dtype.kind != "f" or data.ndim != 3 or data.shape[2] != 3:
        raise DataError(f"'{path}': 'data' is {data.dtype} {data.shape}, expected numbers (clouds, points, 3).")
    label = label.reshape(-1)
    if label.dtype.kind not in "iu" or len(label) != len(data):
        raise DataError(f"'{path}': 'label' is {label.dtype} {label.shape}, expected a whole number per cloud.")
    return torch.from_numpy(data.astype(np.float32)), torch.from_numpy(label.astype(np.int64))
