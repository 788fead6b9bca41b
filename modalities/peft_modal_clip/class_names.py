"""Names of a user's own classes, as prompts say them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from peft_modal.errors import DataError

_SHOWN: Final = 60
"""Characters of a name in a message."""


def read_names(table: Path, folders: Sequence[str]) -> dict[str, str]:
    """The names that a file gives to classes; a line is the folder, a space or a tab, and the name.

    Args:
        table: The file; lines of other folders are passed over, as `classnames.txt` of ImageNet has them for a part.
        folders: All there are; one with spaces in its name is found as well.

    Raises:
        DataError: The file is missing or no text, lacks a folder, or names one twice.
    """
    found: dict[str, str] = {}
    by_length = sorted(folders, key=len, reverse=True)
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.names: '{table}' cannot be read as text: {error}") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        folder = next((f for f in by_length if line.startswith((f"{f} ", f"{f}\t"))), None)
        if folder in found:
            raise DataError(f"data.names: '{table}', line {number} names '{folder}' a second time.")
        if folder is not None:
            found[folder] = line[len(folder) :].strip()
    if missing := [folder for folder in folders if folder not in found]:
        raise DataError(
            f"data.names: '{table}' has no line for '{missing[0]}'; each is the folder's name, a space, and the name"
        )
    return found


def names_in_csv(table: Path) -> dict[str, str]:
    """Names of classes by their labels, out of the column `classname` of a CSV that has been read before; maybe none.

    Raises:
        DataError: A label has none, or two.
    """
    found: dict[str, str] = {}
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        if "classname" not in (reader.fieldnames or ()):
            return {}
        for row in reader:
            where = f"'{table}', line {reader.line_num}"
            label, name = ((row.get(key) or "").strip() for key in ("label", "classname"))
            if not name:
                raise DataError(f"{where}: label {label} has no classname.")
            if found.setdefault(label, name) != name:
                raise DataError(f"{where}: label {label} is both '{found[label][:_SHOWN]}' and '{name[:_SHOWN]}'.")
    return found


def label_order(labels: Sequence[str]) -> list[str]:
    """Labels of a CSV in their order: whole numbers by size, text by the alphabet."""
    is_numbered = all(label.isascii() and label.isdecimal() for label in labels)
    return sorted(labels, key=int) if is_numbered else sorted(labels)


def spoken(names: Mapping[str, str], where: str) -> dict[str, str]:
    """Names with single spaces between their words.

    Raises:
        DataError: A name is no text, or a text encoder cannot tell two apart.
    """
    made: dict[str, str] = {}
    by_sound: dict[str, str] = {}
    for label, name in names.items():
        text = " ".join(name.split())
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the name of class {label!a} is no text in Unicode; rename it.") from error
        sound = " ".join(text.replace("_", " ").split()).casefold()
        if not sound:
            raise DataError(f"{where}: the name of class '{label}' has no words; give it one.")
        if sound in by_sound:
            raise DataError(
                f"{where} calls two folders '{text[:_SHOWN]}', '{by_sound[sound][:_SHOWN]}' and '{label[:_SHOWN]}'; "
                "classes are told apart by their names"
            )
        by_sound[sound] = label
        made[label] = text
    return made
