"""Data modules for your own recordings: in folders, in lists, with one label or several.

Their batches are those of `peft_modal_audio.clips`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from peft_modal.data.folder import SPLITS, FolderIndex, Item, scan_folder
from peft_modal.data.splits import Part
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, Share
from peft_modal_audio.recording_data import RecordingData
from peft_modal_audio.recordings import SUFFIXES
from peft_modal_audio.tables import recording_at, rows_of, whole

_SEPARATOR: Final = ";"


class Folder(RecordingData):
    """Recordings in `DIR/{train,val,test}/<class>/...` or `DIR/<class>/...`, or those a CSV `path,label[,split]` names.

    A CSV with a column `fold` (whole numbers) serves for cross-validation. Files are WAV, FLAC, OGG, MP3 and others, of
    any rate, depth, length and number of channels.

    Args:
        root: The folder or the CSV file.
        fold: Of a CSV with folds, the one that is tested on; the next smaller one, counted around, is validated on.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        seed: Of the held-out files, of `shots`, and of order and augmentation.
        options: Arguments of `RecordingData`.

    Raises:
        ConfigError: There is no such fold.
    """

    def __init__(
        self, *, root: str | Path, fold: NonNegativeInt | None = None, val_share: Share = 0.1, test_share: Share = 0.2,
        seed: int = 0, **options: Any,  # noqa: ANN401 — typed by `RecordingData`
    ) -> None:  # fmt: skip
        super().__init__(root=root, seed=seed, **options)
        self.fold = fold
        self.val_share = val_share
        self.test_share = test_share

    def find(self) -> FolderIndex:
        """The files of the folder or the CSV."""
        if self.fold is not None:
            return _of_fold(self.root, self.fold)
        return scan_folder(
            self.root, suffixes=SUFFIXES, val_share=self.val_share, test_share=self.test_share, seed=self.seed
        )

    def no_samples(self, part: Part) -> str:
        """Where files of a split come from."""
        return f"'{self.root}' has no {part} files: add '{part}/<class>/', or set a {part}_share."


class Tagged(RecordingData):
    """Recordings with several labels each: a CSV `path,labels,split`, labels separated by `;`, for task `multi_label`.

    Args:
        root: The CSV file; its paths are relative to it.
        options: Arguments of `RecordingData`.

    Raises:
        ConfigError: `shots` are asked for, which count clips of one label.
    """

    def __init__(self, *, root: str | Path, **options: Any) -> None:  # noqa: ANN401 — typed by `RecordingData`
        super().__init__(root=root, **options)
        if self.shots is not None:
            raise ConfigError("data.shots: clips with several labels cannot be counted by label; leave it out")

    def find(self) -> FolderIndex:
        """The files that the CSV names; the labels of each are a row of `targets`.

        Raises:
            DataError: A split is unknown, or there is nothing to train on.
        """
        items: dict[str, list[Item]] = {split: [] for split in SPLITS}
        tags: list[list[str]] = []
        for where, row in rows_of(self.root, ("path", "labels", "split")):
            if row["split"] not in SPLITS:
                raise DataError(f"{where}: split is '{row['split']}', expected train, val or test.")
            items[row["split"]].append(recording_at(self.root.parent / row["path"], len(tags), where))
            tags.append([tag.strip() for tag in row["labels"].split(_SEPARATOR) if tag.strip()])
        if not items["train"]:
            raise DataError(f"'{self.root}' names no recordings to train on.")
        names = sorted({tag for item in items["train"] for tag in tags[item.label]})
        places = {name: place for place, name in enumerate(names)}
        if unknown := sorted({tag for of in tags for tag in of} - places.keys()):
            raise DataError(f"'{self.root}': no training recording has the label '{unknown[0]}'.")
        self.targets = torch.zeros(len(tags), len(names))
        for row_number, of in enumerate(tags):
            self.targets[row_number, [places[tag] for tag in of]] = 1.0
        return FolderIndex(tuple(names), *(tuple(items[split]) for split in SPLITS))

    def no_samples(self, part: Part) -> str:
        """Where files of a split come from."""
        return f"'{self.root}' names no {part} files in its column 'split'."


def _of_fold(table: Path, fold: int) -> FolderIndex:
    """Recordings of a CSV with folds.

    Raises:
        ConfigError: It has no such fold, or fewer than three.
    """
    rows = [(where, row, whole(row["fold"], where, "fold")) for where, row in rows_of(table, ("path", "label", "fold"))]
    folds = sorted({number for _, _, number in rows})
    if fold not in folds or len(folds) < 3:
        raise ConfigError(f"data.fold: '{table}' has the folds {folds}; {fold} must be one of three or more")
    held_out = folds[folds.index(fold) - 1]
    names = sorted({row["label"] for _, row, _ in rows})
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for where, row, number in rows:
        split = "test" if number == fold else "val" if number == held_out else "train"
        items[split].append(recording_at(table.parent / row["path"], names.index(row["label"]), where))
    return FolderIndex(tuple(names), *(tuple(items[split]) for split in SPLITS))
