"""Few-shot sets with the lists of NOAH.

Zhang et al., Neural Prompt Search, 2022, arXiv:2206.04673
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from peft_modal.data.folder import FolderIndex
from peft_modal.data.splits import Part
from peft_modal.ranges import PositiveInt
from peft_modal_vision.lists import find_folder, numbered, read_list, row_named
from peft_modal_vision.pictures import PictureData
from peft_modal_vision.transforms import Augmentation, Resize


@dataclass(frozen=True)
class FewShotSet:
    """One of the sets."""

    folders: tuple[str, ...]
    """What its folder is called."""
    classes: int
    train_images: str = "images"
    """The folder of training pictures within it."""
    test_images: str = "images"
    """The folder of the other pictures."""
    val_list: str = "val_meta.list"
    """Empty where no list serves for validation."""
    test_list: str = "test_meta.list"


# NOAH's own folder is misspelt.
_CARS: Final = FewShotSet(("standford-cars", "stanford-cars"), 196, "", "")
FEW_SHOT_SETS: Final[Mapping[str, FewShotSet]] = MappingProxyType(
    {
        "fgvc-aircraft": FewShotSet(("fgvc-aircraft",), 100),
        "food101": FewShotSet(("food101",), 101),
        "oxford-flowers102": FewShotSet(("oxford-flowers102",), 102),
        "oxford-pets": FewShotSet(("oxford-pets",), 37),
        "stanford-cars": _CARS,
        "standford-cars": _CARS,
        # What is called validation in ImageNet is tested on.
        "imagenet": FewShotSet(("imagenet",), 1000, "train", "val", "", "val_meta.list"),
    }
)


class FewShot(PictureData):
    """A few-shot set: `DIR/<dataset>/annotations/train_meta.list.num_shot_K.seed_S` and lists to evaluate on.

    A line is a path below the pictures' folder and a label, split at the last space.

    Args:
        root: The folder that holds the sets' folders.
        dataset: `fgvc-aircraft`, `food101`, `oxford-flowers102`, `oxford-pets`, `stanford-cars` or `imagenet`.
        shots: Training pictures per class: K of the list's name. The lists of NOAH are of 1, 2, 4, 8 and 16.
        seed: S of the list's name (0, 1 or 2 in NOAH's, the mean of which is reported), and of order and augmentation.
        options: Arguments of `PictureData`.

    Raises:
        ConfigError: There is no such set.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        dataset: str,
        shots: PositiveInt = 16,
        resize: Resize = "square",
        augment: list[Augmentation] = ["flip"],  # noqa: B006 — never changed
        seed: int = 0,
        **options: Any,  # noqa: ANN401 — typed by `PictureData`
    ) -> None:
        super().__init__(root=root, resize=resize, augment=augment, seed=seed, **options)
        self.dataset = row_named(FEW_SHOT_SETS, dataset, "dataset")
        self.shots = shots
        self.class_names = numbered(self.dataset.classes)

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The numbered classes of a set; see `peft_modal.inspection.classes.NamesClasses`."""
        return numbered(row_named(FEW_SHOT_SETS, arguments["dataset"], "dataset").classes)

    def find(self) -> FolderIndex:
        """The pictures of the lists."""
        of = self.dataset
        folder = find_folder(self.root, of.folders)
        lists = folder / "annotations"
        train = lists / f"train_meta.list.num_shot_{self.shots}.seed_{self.seed}"
        others = folder / of.test_images
        return FolderIndex(
            self.class_names,
            read_list(train, folder / of.train_images, of.classes),
            read_list(lists / of.val_list, others, of.classes) if of.val_list else (),
            read_list(lists / of.test_list, others, of.classes),
        )

    def no_samples(self, part: Part) -> str:
        """Only ImageNet has no list to validate on."""
        return f"'{self.root}' has no {part} list: ImageNet's val_meta.list is what it is tested on."
