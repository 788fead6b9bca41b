"""Benchmarks in folds that must not be split anew: ESC-50 and UrbanSound8K.

Fold and seed are one number unless told otherwise, so that `compare --seeds 5` tests on all five folds of ESC-50 and
its table has their mean and deviation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, TypeAlias

from peft_modal.data.folder import FolderIndex, Item
from peft_modal.data.splits import Part
from peft_modal.errors import DataError
from peft_modal.ranges import PositiveFloat, Range
from peft_modal_audio.recording_data import RecordingData
from peft_modal_audio.tables import class_order, recording_at, rows_of, whole

EscFold: TypeAlias = Annotated[int, Range(1, 5)]
UrbanFold: TypeAlias = Annotated[int, Range(1, 10)]
Folds = Mapping[int, list[Item]]
URBAN_CLASSES: Final = (
    "air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling", "gun_shot",
    "jackhammer", "siren", "street_music",
)  # fmt: skip


class FoldedRecordings(RecordingData):
    """Base of the two.

    Args:
        fold: The fold that is tested on; None takes the seed's, counted around.
        validate: Hold out the fold before the tested one to validate on; else it is trained on, too.
        options: Arguments of `RecordingData`.
    """

    count: ClassVar[int]
    """Folds."""

    def __init__(self, *, fold: int | None, validate: bool, seed: int, **options: Any) -> None:  # noqa: ANN401
        super().__init__(seed=seed, **options)
        self.fold = seed % self.count + 1 if fold is None else fold
        self.validate = validate

    @abstractmethod
    def read(self) -> tuple[tuple[str, ...], Folds]:
        """Names of the classes, and the files of each fold."""

    def find(self) -> FolderIndex:
        """The files by their folds.

        Raises:
            DataError: A fold has none.
        """
        class_names, folds = self.read()
        numbers = range(1, self.count + 1)
        if missing := [str(number) for number in numbers if not folds.get(number)]:
            raise DataError(f"'{self.root}' has no recordings of fold {', '.join(missing)}.")
        held_out = (self.fold - 2) % self.count + 1 if self.validate else None
        train = [item for number in numbers if number not in {self.fold, held_out} for item in folds[number]]
        val = [] if held_out is None else folds[held_out]
        return FolderIndex(class_names, tuple(train), tuple(val), tuple(folds[self.fold]))

    def no_samples(self, part: Part) -> str:
        """Only a held-out fold is validated on."""
        return f"data.validate is false, which leaves no {part} recordings; set it to true."


class ESC50(FoldedRecordings):
    """ESC-50: 50 classes of 40 clips of 5 s each, in five folds (Piczak, ACM Multimedia 2015).

    Reads `DIR/meta/esc50.csv` and `DIR/audio`, or `DIR/ESC-50-master/...`, as the archive unpacks.

    Args:
        root: DIR.
        fold: The fold that is tested on, 1 to 5; None for that of the seed, so that seeds 0 to 4 are all of them.
        validate: True is PETL-AST's protocol, three folds to train on and one to validate. AST trains on four, and
            chose its epoch on the tested ones.
        seconds: Length of a clip.
        seed: Of order and augmentation.
        options: Arguments of `RecordingData`.
    """

    count: ClassVar[int] = 5

    def __init__(
        self, *, root: str | Path, fold: EscFold | None = None, validate: bool = True, seconds: PositiveFloat = 5.0,
        seed: int = 0, **options: Any,  # noqa: ANN401 — typed by `RecordingData`
    ) -> None:  # fmt: skip
        super().__init__(root=root, fold=fold, validate=validate, seconds=seconds, seed=seed, **options)

    def read(self) -> tuple[tuple[str, ...], Folds]:
        """What `esc50.csv` lists, by the numbers in its column `target`."""
        folder = self.root if (self.root / "meta").is_dir() else self.root / "ESC-50-master"
        table = folder / "meta" / "esc50.csv"
        folds: dict[int, list[Item]] = {}
        names: dict[int, str] = {}
        for where, row in rows_of(table, ("filename", "fold", "target", "category")):
            target = whole(row["target"], where, "target")
            names[target] = row["category"]
            item = recording_at(folder / "audio" / row["filename"], target, where)
            folds.setdefault(whole(row["fold"], where, "fold"), []).append(item)
        return class_order(names, table), folds


class UrbanSound8K(FoldedRecordings):
    """UrbanSound8K: ten classes of up to 4 s, in ten folds (Salamon et al., ACM Multimedia 2014).

    Reads `DIR/metadata/UrbanSound8K.csv` and `DIR/audio/fold1` to `fold10`. Its files are of many rates, depths and
    numbers of channels. Splits of one's own leak: slices of one recording lie in one fold.

    Args:
        root: DIR.
        fold: The fold that is tested on, 1 to 10; None for that of the seed, so that seeds 0 to 9 are all of them.
        validate: Hold out the fold before the tested one. PETL-AST trains on nine and has nothing to validate on.
        seconds: Length of a clip.
        seed: Of order and augmentation.
        options: Arguments of `RecordingData`.
    """

    count: ClassVar[int] = 10

    def __init__(
        self, *, root: str | Path, fold: UrbanFold | None = None, validate: bool = True, seconds: PositiveFloat = 4.0,
        seed: int = 0, **options: Any,  # noqa: ANN401 — typed by `RecordingData`
    ) -> None:  # fmt: skip
        super().__init__(root=root, fold=fold, validate=validate, seconds=seconds, seed=seed, **options)

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The ten classes; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return URBAN_CLASSES

    def read(self) -> tuple[tuple[str, ...], Folds]:
        """What `UrbanSound8K.csv` lists, by the numbers in its column `classID`.

        Raises:
            DataError: A class is called otherwise than in UrbanSound8K.
        """
        table = self.root / "metadata" / "UrbanSound8K.csv"
        folds: dict[int, list[Item]] = {}
        for where, row in rows_of(table, ("slice_file_name", "fold", "classID", "class")):
            label = whole(row["classID"], where, "classID")
            if not 0 <= label < len(URBAN_CLASSES) or URBAN_CLASSES[label] != row["class"]:
                raise DataError(f"{where}: class {label} is called '{row['class']}', which it is not in UrbanSound8K.")
            fold = whole(row["fold"], where, "fold")
            path = self.root / "audio" / f"fold{fold}" / row["slice_file_name"]
            folds.setdefault(fold, []).append(recording_at(path, label, where))
        return URBAN_CLASSES, folds
