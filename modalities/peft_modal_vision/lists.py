"""Lists of pictures as benchmarks ship them: text with a path and a label per line, JSON from paths to class ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from peft_modal.data.folder import Item
from peft_modal.errors import ConfigError, DataError, nearest

_LINE: Final = re.compile(r"(?P<name>.+?)[ \t]+(?P<label>\S+)")
_LABEL: Final = re.compile(r"-?[0-9]+")
_Row = TypeVar("_Row")


def lines_of(table: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold anything, without the space around them; any kind of line end will do.

    Yields:
        Number, counted from 1, and text.

    Raises:
        DataError: The file is missing or no text.
    """
    for number, line in enumerate(_text(table).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def split_line(line: str, where: str) -> tuple[str, int]:
    """Path and label of a line, split at its last space: a path may contain some.

    Raises:
        DataError: It is not of this form.
    """
    found = _LINE.fullmatch(line)
    if found is None or not _LABEL.fullmatch(found["label"]):
        raise DataError(f"{where}: expected a path, a space and a whole number, found '{line}'.")
    return found["name"], int(found["label"])


def read_list(table: Path, folder: Path, num_classes: int) -> tuple[Item, ...]:
    """The pictures that a list names, in its order.

    Args:
        table: The list, a line for each picture.
        folder: What its paths are relative to.
        num_classes: Labels are from 0 to one less.

    Raises:
        DataError: The list is missing, empty or no text; a line is not of this form, its label is out of range, or
            there is no such picture. The message says which line.
    """
    items = []
    for number, line in lines_of(table):
        where = f"'{table}', line {number}"
        name, label = split_line(line, where)
        if not 0 <= label < num_classes:
            raise DataError(f"{where}: label {label} is outside 0..{num_classes - 1}.")
        items.append(Item(picture_at(folder / name, where), label))
    if not items:
        raise DataError(f"'{table}' names no pictures.")
    return tuple(items)


def read_class_ids(table: Path) -> dict[str, int | str]:
    """A JSON object from relative paths of pictures to class ids.

    Raises:
        DataError: The file is missing or not such an object.
    """
    found = read_json(table)
    if not isinstance(found, dict) or not found:
        raise DataError(f"'{table}' must hold an object from paths to class ids.")
    for name, class_id in found.items():
        if isinstance(class_id, bool) or not isinstance(class_id, int | str):
            raise DataError(f"'{table}': the class id of '{name}' is {class_id!r}, expected a number or a text.")
    return found


def read_json(table: Path) -> Any:  # noqa: ANN401 — whatever lies in the file
    """The content of a JSON file.

    Raises:
        DataError: The file is missing or no JSON.
    """
    try:
        return json.loads(_text(table))
    except json.JSONDecodeError as error:
        raise DataError(f"'{table}', line {error.lineno}: this is no JSON, {error.msg}.") from error
    except RecursionError as error:
        raise DataError(f"'{table}' is nested too deeply.") from error


def picture_at(path: Path, where: str) -> Path:
    """The path of a file that is there.

    Raises:
        DataError: It is not.
    """
    try:
        is_there = path.is_file()
    except (OSError, ValueError):  # too long for a name, or no name at all
        is_there = False
    if not is_there:
        raise DataError(f"{where}: the picture '{path}' does not exist.")
    return path


def find_folder(root: Path, names: Sequence[str]) -> Path:
    """The first folder of these names below `root`.

    Raises:
        DataError: There is none.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
    raise DataError(f"'{root}' has no folder '{names[0]}'{others}; set data.root to the folder that holds it.")


def row_named(table: Mapping[str, _Row], name: str, argument: str) -> _Row:
    """The row of a table of benchmarks.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in table:
        raise ConfigError(f"data.{argument}: '{name}' is unknown, {nearest(name, table)}")
    return table[name]


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes where a list has but their numbers."""
    return tuple(f"class {label}" for label in range(count))


def _text(table: Path) -> str:
    """The content of a file, every line end a line feed.

    Raises:
        DataError: It is missing or no text.
    """
    if not table.is_file():
        raise DataError(f"the list '{table}' does not exist.")
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{table}' cannot be read as text in UTF-8: {error}") from error
