"""Tables of recordings as benchmarks ship them: CSV with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peft_modal.data.folder import Item
from peft_modal.errors import DataError


def rows_of(table: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The rows of a CSV.

    Args:
        table: The file.
        columns: What each row must have.

    Yields:
        For messages where it stands, and the row, without the space around its values.

    Raises:
        DataError: The file is missing or no CSV, or lacks a column or a value.
    """
    if not table.is_file():
        raise DataError(f"the table '{table}' does not exist.")
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            found = reader.fieldnames or []
            if missing := [name for name in columns if name not in found]:
                raise DataError(f"'{table}' has no column {', '.join(missing)}; it has {', '.join(found) or 'none'}.")
            for row in reader:
                where = f"'{table}', line {reader.line_num}"
                values = {name: (row.get(name) or "").strip() for name in columns}
                if empty := [name for name, value in values.items() if not value]:
                    raise DataError(f"{where}: {', '.join(empty)} is empty.")
                yield where, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"'{table}' cannot be read as CSV: {error}") from error


def whole(value: str, where: str, name: str) -> int:
    """A number of a row.

    Raises:
        DataError: It is none.
    """
    try:
        return int(value)
    except ValueError as error:
        raise DataError(f"{where}: {name} is '{value}', expected a whole number.") from error


def class_order(names: Mapping[int, str], table: Path) -> tuple[str, ...]:
    """Names of classes in the order of their numbers.

    Raises:
        DataError: The numbers are not those from 0 on.
    """
    if sorted(names) != list(range(len(names))):
        raise DataError(f"'{table}': the numbers of the classes are {sorted(names)}, expected 0 to {len(names) - 1}.")
    return tuple(names[number] for number in sorted(names))


def recording_at(path: Path, label: int, where: str) -> Item:
    """A file that is there, with its label.

    Raises:
        DataError: It is not.
    """
    if not path.is_file():
        raise DataError(f"{where}: the recording '{path}' does not exist.")
    return Item(path, label)
