"""Data modules over sequences on disk: the benchmarks' layouts, several at once, and your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part
from peft_modal.errors import DataError
from peft_modal.ranges import Share
from peft_modal_tracking.data import TrackingData
from peft_modal_tracking.layouts import Layout, find_sequences
from peft_modal_tracking.sequences import Video


class SequenceFiles(TrackingData):
    """Base of data modules over one folder in a benchmark's layout; a subclass says which.

    Where there is no `val` split, a share of the training sequences is held out for validation; where there is no
    `test` split whose boxes are all known, validation sequences are tested on.

    Args:
        root: The data set's folder.
        val_share: Share of the training sequences held out for validation where there is no split for it.
        seed: Of what is held out, of draws and augmentation.
        options: Arguments of `TrackingData`.
    """

    layout: ClassVar[Layout]
    """How the folder is laid out."""

    def __init__(
        self,
        *,
        root: str | Path,
        val_share: Share = 0.1,
        seed: int = 0,
        **options: Any,  # noqa: ANN401 — typed by `TrackingData`
    ) -> None:
        super().__init__(seed=seed, **options)
        self.root = Path(root)
        self.val_share = val_share

    def find(self, part: Part) -> list[Video]:
        """The sequences of a split as they lie on disk, none where it has none."""
        return find_sequences(self.root, self.layout, part)

    def load(self, part: Part) -> Sequence[Video]:
        """The sequences of a split.

        Raises:
            DataError: There are none to train on.
        """
        if part == "train":
            kept, _ = self._train_and_held_out()
            if not kept:
                raise DataError(f"'{self.root}' has no training sequences of layout '{self.layout}'")
            return kept
        own = [video for video in self.find(part) if video.has_truth]
        if own:
            return own
        if part == "test":
            return self.load("val")
        return self._train_and_held_out()[1]

    def _train_and_held_out(self) -> tuple[list[Video], list[Video]]:
        found = self.find("train")
        if len(found) < 2 or any(video.has_truth for video in self.find("val")):
            return found, []
        count = max(1, round(len(found) * self.val_share)) if self.val_share else 0
        held = set(torch.randperm(len(found), generator=seeded("held out", self.seed))[:count].tolist())
        return (
            [video for i, video in enumerate(found) if i not in held],
            [video for i, video in enumerate(found) if i in held],
        )


class GOT10k(SequenceFiles):
    """GOT-10k as published: `{train,val,test}/list.txt` and a folder for each sequence (Huang et al., TPAMI 2021).

    The truth of the test split is withheld; `predict --layout got10k --results got10k` writes what its server takes.
    """

    layout: ClassVar[Layout] = "got10k"


class LaSOT(SequenceFiles):
    """LaSOT as published: `CLASS/CLASS-N`, `training_set.txt` and `testing_set.txt` (Fan et al., CVPR 2019)."""

    layout: ClassVar[Layout] = "lasot"


class TrackingNet(SequenceFiles):
    """TrackingNet as published: `TRAIN_0` to `TRAIN_11` and `TEST` (Mueller et al., ECCV 2018)."""

    layout: ClassVar[Layout] = "trackingnet"


class OTB(SequenceFiles):
    """OTB as published, a benchmark to test on (Wu et al., TPAMI 2015)."""

    layout: ClassVar[Layout] = "otb"

    def load(self, part: Part) -> Sequence[Video]:
        """All sequences for testing.

        Raises:
            DataError: They are asked for to train on.
        """
        if part == "train":
            raise DataError("OTB is a benchmark to test on; train on got10k, lasot, trackingnet or a folder")
        return self.find("test") if part == "test" else []


class Folder(SequenceFiles):
    """Your own sequences: `DIR/{train,val,test}/NAME/` or `DIR/NAME/` with frames or one video file, and boxes.

    `groundtruth.txt` holds x,y,w,h from 0 of every frame; `absence.txt`, if it is there, a 1 for each frame that does
    not show the target. Without splits a share is held out for validation, and tested on.
    """

    layout: ClassVar[Layout] = "folder"
