"""What data modules of CLIP share that read pictures of named classes from files: the few-shot protocol.

A batch is that of `peft_modal_vision.pictures`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_modal.data.folder import FolderIndex, Item
from peft_modal.errors import DataError
from peft_modal.ranges import PositiveInt, Share
from peft_modal_clip.shots import Classes, cut_classes, draw_shots, read_shots
from peft_modal_clip.splits import Entry, Split, rows_of
from peft_modal_vision.lists import picture_at
from peft_modal_vision.pictures import PictureData
from peft_modal_vision.transforms import CROP_SCALE, Augmentation, Normalize, Resize


@dataclass(frozen=True)
class Source:
    """All pictures of a set, before any are drawn."""

    split: Split
    class_names: tuple[str, ...]
    """In label order."""
    images: Path
    """What the entries' paths are relative to."""
    facts: dict[str, Any]
    """Where the split comes from, for the record of a run."""


class FewPictures(PictureData):
    """Base of CLIP's data modules of classes; a subclass gives `source`, and its constructor hands the rest on.

    Args:
        root: What is read.
        shots: Training pictures per class, drawn by the seed as CoOp does, and as many to validate on, at most four; a
            class with fewer gives all. null takes everything.
        classes: `all`; `base` trains and validates on the first half of the classes in label order (of an odd number
            one more) and tests on all, for `task.base_to_new`; `new` is the other half alone.
        shots_file: The shots of another run, by its `data.json`, or of the authors' code, by its
            `shot_<K>-seed_<S>.pkl`; null draws them.
        allow_pickle: Open such a pickle, with a reader that does nothing but give what it lists.
        resize: `fit` makes the shorter side `resolution` and cuts the middle out, as CLIP does; see `PictureData`.
        augment: What changes training pictures at random.
        crop_scale: Least and largest share of a picture's area for `resized_crop`.
        normalize: Mean and deviation of the channels: those of `clip`, or 0.5 each (`half`, the nano's). It has to be
            what the weights were trained with.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        options: Arguments of `PictureData`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        shots: PositiveInt | None,
        classes: Classes = "all",
        shots_file: str | Path | None = None,
        allow_pickle: bool = False,
        resize: Resize = "fit",
        augment: list[Augmentation] = ["resized_crop", "flip"],  # noqa: B006 — never changed
        crop_scale: tuple[Share, Share] = CROP_SCALE,
        normalize: Normalize = "clip",
        batch_size: PositiveInt = 32,
        **options: Any,  # noqa: ANN401 — typed by `PictureData`
    ) -> None:
        super().__init__(
            root=root, resize=resize, augment=augment, crop_scale=crop_scale, normalize=normalize,
            batch_size=batch_size, **options,
        )  # fmt: skip
        self.shots = shots
        self.classes: Classes = classes
        self.shots_file = None if shots_file is None else Path(shots_file)
        self.allow_pickle = allow_pickle
        self._record: dict[str, Any] = {}

    @abstractmethod
    def source(self) -> Source:
        """All pictures of the set."""

    def published_shots(self) -> Path | None:
        """A file of shots that belongs to the set and is to be preferred to a draw; by default none."""
        return None

    def find(self) -> FolderIndex:
        """The pictures of the shots and of the test part; the classes are cut after the shots are drawn.

        Raises:
            DataError: Files cannot serve, or a class has nothing to train on.
        """
        source = self.source()
        chosen, drawn_from = self._shots(source.split)
        if chosen.train:
            _require_every_class(chosen.train, source.class_names, f"'{self.root}'")
        split, class_names = cut_classes(chosen, source.class_names, self.classes)
        self._record = {
            **source.facts, **drawn_from, "classes": self.classes, "class_names": list(class_names),
            "train": rows_of(chosen.train), "val": rows_of(chosen.val), "test_pictures": len(split.test),
        }  # fmt: skip
        return FolderIndex(class_names, *(_items(part, source.images) for part in split))

    def record(self) -> dict[str, Any]:
        """The split's checksum and what was drawn of all classes; see `peft_modal.data.record.KeepsRecord`."""
        return self._record

    def _shots(self, split: Split) -> tuple[Split, dict[str, Any]]:
        file = self.published_shots() if self.shots_file is None else self.shots_file
        facts: dict[str, Any] = {"shots": self.shots, "seed": self.seed}
        if file is None:
            return draw_shots(split, self.shots, self.seed), facts
        return read_shots(file, split, allow_pickle=self.allow_pickle), {**facts, "shots_file": str(file)}


def _require_every_class(train: Sequence[Entry], class_names: Sequence[str], where: str) -> None:
    without = sorted({*range(len(class_names))} - {entry.label for entry in train})
    if without:
        raise DataError(
            f"{where}: class '{class_names[without[0]][:60]}' has no picture to train on"
            f"{f' (nor have {len(without) - 1} others)' if without[1:] else ''}; add some, or leave the class out."
        )


def _items(entries: Sequence[Entry], images: Path) -> tuple[Item, ...]:
    where = f"the split of '{images}'"
    return tuple(Item(picture_at(images / entry.path, where), entry.label) for entry in entries)
