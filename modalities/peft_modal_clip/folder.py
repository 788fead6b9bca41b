"""Photos of one's own by class, for a classifier that reads the names of the classes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

from peft_modal.data.folder import FolderIndex
from peft_modal.errors import DataError
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_vision import data as pictures
from peft_modal_vision.transforms import Augmentation, Normalize, Resize


class Folder(pictures.Folder):
    """Pictures in `DIR/{train,val,test}/<class>/...` or `DIR/<class>/...`, or those a CSV `path,label[,split]` names.

    The name of a class is that of its folder, or its label in the CSV.

    Args:
        root: The folder or the CSV file.
        shots: Training pictures per class, drawn by the seed; more of them include the fewer. None takes all.
        classes: Which classes there is training and validation data of: `all`, or the first half (`base`; of an odd
            number one more), for tests of what becomes of the other half. Shots are drawn before.
        names: A text file with a line for each class, the folder's name, a space, and the name that is read, as in
            ImageNet's `classnames.txt`.
        resolution: Side in pixels of what the network sees.
        resize: `fit` makes the shorter side that long and cuts the middle out, as CLIP does; `crop` makes it 256/224 of
            that before; `square` ignores the ratio of a picture's sides.
        augment: What changes training pictures at random; see `folder` of the vision modality.
        normalize: Mean and deviation of the channels: CLIP's, 0.5 each (`half`, the nano's), ImageNet's,
            or left in 0..1 (`none`).
        batch_size: Pictures per training batch; evaluation takes twice as many.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        seed: Of the held-out files, of `shots`, and of order and augmentation.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        shots: PositiveInt | None = None,
        classes: Literal["all", "base"] = "all",
        names: str | Path | None = None,
        resolution: PositiveInt = 224,
        resize: Resize = "fit",
        augment: list[Augmentation] = ["resized_crop", "flip"],  # noqa: B006 — never changed
        normalize: Normalize = "clip",
        batch_size: PositiveInt = 32,
        val_share: Share = 0.1,
        test_share: Share = 0.2,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            root=root, shots=shots, resolution=resolution, resize=resize, augment=augment, normalize=normalize,
            batch_size=batch_size, val_share=val_share, test_share=test_share, seed=seed, num_workers=num_workers,
        )  # fmt: skip
        self.classes: Literal["all", "base"] = classes
        self.names = None if names is None else Path(names)

    def find(self) -> FolderIndex:
        """See `Folder` of the vision modality; with the names that are read, and of `base` without the new classes."""
        index = super().find()
        if self.names is not None:
            index = replace(index, class_names=read_names(self.names, index.class_names))
        if self.classes == "base":
            count = math.ceil(len(index.class_names) / 2)
            index = replace(
                index,
                train=tuple(item for item in index.train if item.label < count),
                val=tuple(item for item in index.val if item.label < count),
            )
        return index


def read_names(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a file gives to folders, in the folders' order.

    Raises:
        DataError: The file is missing, lacks a folder, or names two alike.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.names: '{path}' cannot be read as text: {error}") from error
    named = {folder: name.strip() for folder, _, name in (line.strip().partition(" ") for line in lines) if name}
    if missing := [folder for folder in folders if folder not in named]:
        raise DataError(
            f"data.names: '{path}' has no line for '{missing[0]}'; each is the folder's name, a space, and the name"
        )
    names = tuple(named[folder] for folder in folders)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"data.names: '{path}' calls two folders '{twice[0]}'; classes are told apart by their names")
    return names
