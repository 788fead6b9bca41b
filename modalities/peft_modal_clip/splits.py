"""Which pictures of a few-shot set belong to training, validation and test: the split files of CoOp.

Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from peft_modal.errors import DataError
from peft_modal.files import write_text
from peft_modal_vision.lists import read_json

PARTS: Final = ("train", "val", "test")
MADE_BY: Final = "made_by"
"""Key of a split file that this project wrote; published ones have none."""


@dataclass(frozen=True)
class Entry:
    """A picture of a set."""

    path: str
    """Relative to the folder of pictures, with slashes."""
    label: int
    name: str
    """Of its class, as prompts say it."""


@dataclass(frozen=True)
class Split:
    """The pictures of the three parts, in the order of the file; which shots are drawn depends on that order."""

    train: tuple[Entry, ...]
    val: tuple[Entry, ...]
    test: tuple[Entry, ...]

    def __iter__(self) -> Iterator[tuple[Entry, ...]]:
        return iter((self.train, self.val, self.test))

    def class_names(self, where: str) -> tuple[str, ...]:
        """One name for each label.

        Raises:
            DataError: There are none, labels are not counted from 0 without gaps, or one has two names.
        """
        names: dict[int, str] = {}
        for part in self:
            for entry in part:
                if names.setdefault(entry.label, entry.name) != entry.name:
                    raise DataError(
                        f"{where}: label {entry.label} is both '{names[entry.label]}' and '{entry.name}' "
                        f"('{entry.path}')."
                    )
        if not names:
            raise DataError(f"{where} names no pictures.")
        missing = next((place for place, label in enumerate(sorted(names)) if place != label), None)
        if missing is not None:
            raise DataError(f"{where}: no picture has the label {missing}, but there are labels up to {max(names)}.")
        return tuple(names[label] for label in sorted(names))

    def renamed(self, names: Mapping[str, str]) -> Split:
        """With other names for some classes; what is renamed already stays."""
        if not names:
            return self
        return Split(*(tuple(replace(e, name=names.get(e.name, e.name)) for e in part) for part in self))


@dataclass(frozen=True)
class SplitFile:
    """What a split file says."""

    split: Split
    is_published: bool
    """False where `write_split` wrote it."""
    sha256: str
    """Of the file."""


def read_split(path: Path) -> SplitFile:
    """A file `split_zhou_<Name>.json`: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Raises:
        DataError: The file is missing or of another form; the message says where.
    """
    found = read_json(path)
    if not isinstance(found, Mapping) or not all(isinstance(found.get(part), list) for part in PARTS):
        raise DataError(f"'{path}' must hold the lists 'train', 'val' and 'test'.")
    split = Split(*(entries_of(found[part], f"'{path}', {part}") for part in PARTS))
    return SplitFile(split, MADE_BY not in found, hashlib.sha256(path.read_bytes()).hexdigest())


def entries_of(rows: Sequence[Any], where: str) -> tuple[Entry, ...]:
    """Entries of rows [path, label, class name].

    Raises:
        DataError: A row is of another form.
    """
    made = []
    for number, row in enumerate(rows, start=1):
        kinds = tuple(type(value) for value in row) if isinstance(row, list | tuple) else ()
        if kinds != (str, int, str) or row[1] < 0 or not row[0] or not row[2].strip():
            shown = json.dumps(row, ensure_ascii=False, default=str)[:80]
            raise DataError(f"{where}, entry {number}: expected [path, label, class name], found {shown}.")
        made.append(Entry(row[0].replace("\\", "/"), row[1], row[2]))
    return tuple(made)


def rows_of(entries: Sequence[Entry]) -> list[list[str | int]]:
    """Entries as split files hold them."""
    return [[entry.path, entry.label, entry.name] for entry in entries]


def write_split(path: Path, split: Split) -> None:
    """Write a split that was made here; other code bases read it as one of theirs.

    Raises:
        WriteError: It cannot be written.
    """
    document = {
        MADE_BY: "peft_modal; not the published split",
        **{name: rows_of(part) for name, part in zip(PARTS, split, strict=True)},
    }
    # In ASCII: a file's name need not be text in Unicode.
    write_text(path, json.dumps(document) + "\n")


def checksum_of(split: Split) -> str:
    """SHA-256 of a split's content, for sets whose lists lie in several files."""
    content = {name: rows_of(part) for name, part in zip(PARTS, split, strict=True)}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
