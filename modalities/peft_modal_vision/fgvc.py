"""FGVC: five sets of fine-grained classes with the splits of Visual Prompt Tuning.

Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from peft_modal.data.folder import FolderIndex, Item
from peft_modal.data.splits import Part
from peft_modal.errors import DataError
from peft_modal_vision.lists import find_folder, lines_of, numbered, picture_at, read_class_ids, row_named
from peft_modal_vision.pictures import PictureData
from peft_modal_vision.transforms import Augmentation, Resize

_Ids = Mapping[str, int | str]
"""Class ids of pictures, by their paths."""


@dataclass(frozen=True)
class FgvcSet:
    """One of the five."""

    folders: tuple[str, ...]
    """What its folder is called."""
    classes: int
    images: str = ""
    """The folder of pictures within it."""


_CUB: Final = FgvcSet(("CUB_200_2011",), 200, "images")
_FLOWERS: Final = FgvcSet(("OxfordFlowers", "OxfordFlower"), 102)
FGVC_SETS: Final[Mapping[str, FgvcSet]] = MappingProxyType(
    {
        "CUB_200_2011": _CUB,
        "nabirds": FgvcSet(("nabirds",), 555, "images"),
        "OxfordFlowers": _FLOWERS,
        "OxfordFlower": _FLOWERS,
        "StanfordDogs": FgvcSet(("StanfordDogs",), 120, "Images"),
        "StanfordCars": FgvcSet(("StanfordCars",), 196),
    }
)


class Fgvc(PictureData):
    """A set of FGVC: `DIR/<dataset>/{train,val,test}.json`, each an object from paths of pictures to class ids.

    Labels are the places of the class ids of `train.json` in their order; the other splits use the same. Of CUB the
    folder as published serves as well (`images.txt`, `image_class_labels.txt`, `train_test_split.txt`): all its
    training pictures are trained on, and there are none to validate on.

    Args:
        root: The folder that holds the sets' folders.
        dataset: `CUB_200_2011`, `nabirds`, `OxfordFlowers`, `StanfordDogs` or `StanfordCars`.
        options: Arguments of `PictureData`.

    Raises:
        ConfigError: There is no such set.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        dataset: str,
        resize: Resize = "crop",
        augment: list[Augmentation] = ["crop", "flip"],  # noqa: B006 — never changed
        **options: Any,  # noqa: ANN401 — typed by `PictureData`
    ) -> None:
        super().__init__(root=root, resize=resize, augment=augment, **options)
        self.dataset = row_named(FGVC_SETS, dataset, "dataset")

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """As many as the set has; see `peft_modal.inspection.classes.NamesClasses`."""
        return numbered(row_named(FGVC_SETS, arguments["dataset"], "dataset").classes)

    def find(self) -> FolderIndex:
        """The pictures of the three files."""
        folder = find_folder(self.root, self.dataset.folders)
        if self.dataset is _CUB and not (folder / "train.json").is_file() and (folder / "images.txt").is_file():
            tables = dict.fromkeys(("train", "val", "test"), folder / "images.txt")
            ids = published_cub(folder)
        else:
            tables = {part: folder / f"{part}.json" for part in ("train", "val", "test")}
            ids = {part: read_class_ids(table) for part, table in tables.items()}
        class_names = label_order(ids["train"])
        labels = {name: label for label, name in enumerate(class_names)}
        train, val, test = (
            _labelled(ids[part], labels, folder / self.dataset.images, f"'{tables[part]}'") for part in tables
        )
        return FolderIndex(class_names, train, val, test)

    def no_samples(self, part: Part) -> str:
        """Only CUB as published leaves nothing to validate on."""
        return (
            f"CUB as published has no {part} pictures; put VPT's train.json, val.json and test.json beside images.txt."
        )


def label_order(ids: _Ids) -> tuple[str, ...]:
    """Class ids as text in the order of their labels: numbers by size, text by the alphabet, as VPT sorts them."""
    values = set(ids.values())
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        return tuple(str(value) for value in sorted(numbers))
    return tuple(sorted({str(value) for value in values}))


def _labelled(ids: _Ids, labels: Mapping[str, int], folder: Path, where: str) -> tuple[Item, ...]:
    """Pictures with their labels.

    Raises:
        DataError: A class is not among those of the training pictures, or a picture is missing.
    """
    for name, class_id in ids.items():
        if str(class_id) not in labels:
            raise DataError(f"{where}: '{name}' has the class id {class_id!r}, which no training picture has.")
    return tuple(Item(picture_at(folder / name, where), labels[str(class_id)]) for name, class_id in ids.items())


def published_cub(folder: Path) -> dict[str, dict[str, int | str]]:
    """Class ids of CUB's pictures by split, from its three tables; `val` is empty.

    Raises:
        DataError: A table is missing, names a picture twice, or lacks one that `images.txt` has.
    """
    paths, classes, is_training = (
        _by_id(folder / name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    splits: dict[str, dict[str, int | str]] = {"train": {}, "val": {}, "test": {}}
    for number, path in paths.items():
        for values, name in ((classes, "image_class_labels.txt"), (is_training, "train_test_split.txt")):
            if not values.get(number, "").isdecimal():
                raise DataError(f"'{folder / name}' has no number for picture {number}, '{path}'.")
        splits["train" if int(is_training[number]) else "test"][path] = int(classes[number])
    return splits


def _by_id(table: Path) -> dict[str, str]:
    """A table of a number and a value per line.

    Raises:
        DataError: It is missing, or a line is not of this form or repeats a number.
    """
    values: dict[str, str] = {}
    for line_number, line in lines_of(table):
        key, _, value = line.partition(" ")
        if not value or key in values:
            raise DataError(f"'{table}', line {line_number}: expected another number and a value, found '{line}'.")
        values[key] = value.strip()
    return values
