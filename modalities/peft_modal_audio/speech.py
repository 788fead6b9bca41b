"""Benchmarks of spoken words and commands, as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from peft_modal.data.folder import FolderIndex, Item
from peft_modal.errors import DataError
from peft_modal.ranges import PositiveFloat
from peft_modal_audio.recording_data import RecordingData
from peft_modal_audio.tables import recording_at, rows_of
from peft_modal_vision.lists import lines_of

_FLUENT_PARTS: Final = {"train": "train_data.csv", "val": "valid_data.csv", "test": "test_data.csv"}
_INTENT: Final = ("action", "object", "location")


class SpeechCommands(RecordingData):
    """Speech Commands v2: 35 words of a second (Warden, 2018, arXiv:1804.03209).

    Reads `DIR/<word>/*.wav`, and the lists `validation_list.txt` and `testing_list.txt`; what is in neither is trained
    on. Folders that begin with `_` hold no words.

    Args:
        root: DIR.
        seconds: Length of a clip.
        options: Arguments of `RecordingData`.
    """

    def __init__(self, *, root: str | Path, seconds: PositiveFloat = 1.0, **options: Any) -> None:  # noqa: ANN401
        super().__init__(root=root, seconds=seconds, **options)

    def find(self) -> FolderIndex:
        """The files below the words' folders, by the lists.

        Raises:
            DataError: There are no such folders, or a list names what is not there.
        """
        if not self.root.is_dir():
            raise DataError(f"'{self.root}' is no folder.")
        words = sorted(f.name for f in self.root.iterdir() if f.is_dir() and not f.name.startswith(("_", ".")))
        if not words:
            raise DataError(f"'{self.root}' has no folder for each word.")
        labels = {word: label for label, word in enumerate(words)}
        listed: dict[str, tuple[Item, ...]] = {}
        for part, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
            table = self.root / name
            listed[part] = tuple(self._item(table, number, line, labels) for number, line in lines_of(table))
        taken = {item.path for items in listed.values() for item in items}
        train = [
            Item(path, labels[word])
            for word in words
            for path in sorted((self.root / word).glob("*.wav"))
            if path not in taken
        ]
        return FolderIndex(tuple(words), tuple(train), listed["val"], listed["test"])

    def _item(self, table: Path, number: int, line: str, labels: dict[str, int]) -> Item:
        where = f"'{table}', line {number}"
        word = line.partition("/")[0]
        if word not in labels:
            raise DataError(f"{where}: there is no folder '{word}'.")
        return recording_at(self.root / line, labels[word], where)


class FluentSpeechCommands(RecordingData):
    """Fluent Speech Commands: 31 intents of spoken commands (Lugosch et al., Interspeech 2019, arXiv:1904.03670).

    Reads `DIR/data/{train,valid,test}_data.csv` and the recordings that they name. An intent is the triple of action,
    object and location; intents are sorted.

    Args:
        root: DIR.
        seconds: Length of a clip.
        options: Arguments of `RecordingData`.
    """

    def __init__(self, *, root: str | Path, seconds: PositiveFloat = 4.0, **options: Any) -> None:  # noqa: ANN401
        super().__init__(root=root, seconds=seconds, **options)

    def find(self) -> FolderIndex:
        """The recordings of the three tables.

        Raises:
            DataError: A table or a recording is missing, or an intent is not among those of training.
        """
        rows = {
            part: list(rows_of(self.root / "data" / name, ("path", *_INTENT))) for part, name in _FLUENT_PARTS.items()
        }
        intents = sorted({tuple(row[name] for name in _INTENT) for _, row in rows["train"]})
        labels = {intent: label for label, intent in enumerate(intents)}
        items: dict[str, list[Item]] = {part: [] for part in rows}
        for part, of_part in rows.items():
            for where, row in of_part:
                intent = tuple(row[name] for name in _INTENT)
                if intent not in labels:
                    raise DataError(f"{where}: no recording of training means '{', '.join(intent)}'.")
                items[part].append(recording_at(self.root / row["path"], labels[intent], where))
        names = tuple(", ".join(intent) for intent in intents)
        return FolderIndex(names, tuple(items["train"]), tuple(items["val"]), tuple(items["test"]))
