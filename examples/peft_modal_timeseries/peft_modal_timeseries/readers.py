"""Series out of files: `.ts` of the UEA archive, `.tsv` of the UCR archive, and CSV with one column per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_modal.errors import DataError

ARCHIVES = (".ts", ".tsv")
"""Files with many series and their labels."""
SUFFIXES = (".csv", *ARCHIVES)


@dataclass(frozen=True, eq=False)
class Record:
    """One series of a file."""

    values: Tensor
    """(C, T) float32."""
    label: str
    """Class as written in the file, "" where there is none."""


def read_series(path: str | Path) -> list[Record]:
    """All series of a file.

    `.ts`: header lines `@...`, then one series per line, channels separated by `:`, the class last. `.tsv`: one series
    per line with the class first; NaN at the end fills up shorter series. `.csv`: one series, a row per step and a
    column per channel, with or without a line of names.

    Args:
        path: A file with one of `SUFFIXES`.

    Raises:
        DataError: The file is missing, of another kind, empty, or damaged; says in which line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"'{path}' is no file of time series: expected one of {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error
    records = list(reader(path, text))
    if not records:
        raise DataError(f"'{path}' holds no series.")
    widths = {len(record.values) for record in records}
    if len(widths) > 1:
        raise DataError(
            f"'{path}' holds series of {' and '.join(map(str, sorted(widths)))} channels; all need the same."
        )
    return records


def _read_ts(path: Path, text: str) -> Iterator[Record]:
    labelled: bool | None = None
    in_data = False
    for number, line in enumerate(text.splitlines(), 1):
        where = f"'{path}', line {number}"
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if not in_data:
            if not words[0].startswith("@"):
                raise DataError(f"{where}: expected a header line that starts with '@', or '@data' before the series.")
            key, value = words[0].lower(), " ".join(words[1:2]).lower()
            if key in {"@timestamps", "@targetlabel"} and value == "true":
                raise DataError(f"{where}: {words[0]} is true; only values at equal steps with classes are read.")
            if key == "@classlabel":
                labelled = value == "true"
            in_data = key == "@data"
            continue
        if labelled is None:
            raise DataError(f"'{path}' has no line '@classLabel true ...' or '@classLabel false' before its series.")
        parts = line.strip().split(":")
        label = parts.pop().strip() if labelled else ""
        if labelled and (not label or not parts):
            raise DataError(f"{where}: expected channels and a class, separated by ':'.")
        channels = [_numbers(part.split(","), where) for part in parts]
        yield Record(_stack(channels, where), label)
    if not in_data:
        raise DataError(f"'{path}' has no line '@data'.")


def _read_tsv(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"'{path}', line {number}"
        label, *fields = line.strip().split("\t")
        while fields and fields[-1].strip().lower() == "nan":
            fields.pop()
        if not fields:
            raise DataError(f"{where}: expected a class and values, separated by tabs.")
        yield Record(_stack([_numbers(fields, where)], where), label.strip())


def _read_csv(path: Path, text: str) -> Iterator[Record]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and not any(_is_number(field) for field in lines[0][1].split(",")):
        lines = lines[1:]
    rows = [_numbers(line.split(","), f"'{path}', line {number}") for number, line in lines]
    for (number, _), row in zip(lines, rows, strict=True):
        if len(row) != len(rows[0]):
            raise DataError(f"'{path}', line {number}: {len(row)} columns, the first row has {len(rows[0])}.")
    if rows:
        yield Record(_stack([list(column) for column in zip(*rows, strict=True)], f"'{path}'"), "")


def _numbers(fields: list[str], where: str) -> list[float]:
    values = []
    for position, field in enumerate(fields, 1):
        if field.strip().lower() in {"?", "nan", ""}:
            raise DataError(f"{where}: value {position} is missing ('{field.strip()}'); fill gaps before.")
        if not _is_number(field):
            raise DataError(f"{where}: value {position} is '{field.strip()}', expected a number.")
        values.append(float(field))
    return values


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _stack(channels: list[list[float]], where: str) -> Tensor:
    lengths = {len(channel) for channel in channels}
    if len(lengths) != 1:
        raise DataError(
            f"{where}: its channels have {' and '.join(map(str, sorted(lengths)))} values; all need the same."
        )
    values = torch.tensor(channels, dtype=torch.float32)
    if values.shape[1] < 2:
        raise DataError(f"{where}: a series needs at least 2 values, this one has {values.shape[1]}.")
    if not values.isfinite().all():
        raise DataError(f"{where}: a value is infinite, or too large for float32.")
    return values


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {".csv": _read_csv, ".ts": _read_ts, ".tsv": _read_tsv}
