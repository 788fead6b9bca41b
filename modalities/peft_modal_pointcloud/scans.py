"""Point files of any length: some of their rows, in memory for those rows only."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from peft_modal.errors import DataError
from peft_modal.extras import require

Indices = NDArray[np.integer[Any]]
_CHUNK_BYTES: Final = 1 << 22
"""Of a scan, decoded at a time."""
_LONGEST_HEADER: Final = 1 << 16
_PLY_TYPES: Final = MappingProxyType(
    {
        **dict.fromkeys(("char", "int8"), "i1"), **dict.fromkeys(("uchar", "uint8"), "u1"),
        **dict.fromkeys(("short", "int16"), "i2"), **dict.fromkeys(("ushort", "uint16"), "u2"),
        **dict.fromkeys(("int", "int32"), "i4"), **dict.fromkeys(("uint", "uint32"), "u4"),
        **dict.fromkeys(("float", "float32"), "f4"), **dict.fromkeys(("double", "float64"), "f8"),
    }
)  # fmt: skip


class Rows(Protocol):
    """The points of a file, of which nothing but their number is known yet."""

    def __len__(self) -> int:
        """How many there are."""

    def take(self, indices: Indices | None) -> NDArray[np.generic]:
        """The rows at ascending places, all of them for None."""


@dataclass(frozen=True)
class ArrayRows:
    """Rows of an array, in memory or mapped."""

    values: NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Indices | None) -> NDArray[np.generic]:
        """See `Rows`."""
        return self.values if indices is None else self.values[indices]


class TextRows:
    """Rows of a text file, separated by commas or white space; `#` begins a comment.

    It is read twice, and lines that are not taken are counted and not looked at.

    Raises:
        DataError: There are none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = next(self._lines(), None)
        if first is None:
            raise DataError(f"'{path}' holds no points.")
        self.delimiter = "," if "," in first.partition("#")[0] else None
        self.count = sum(1 for _ in self._lines())

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Indices | None) -> NDArray[np.generic]:
        """See `Rows`."""
        lines = self._lines() if indices is None else picked(self._lines(), indices)
        return np.loadtxt(lines, delimiter=self.delimiter, comments="#", ndmin=2)

    def _lines(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8-sig") as stream:
            for line in stream:
                if line.partition("#")[0].strip():
                    yield line


class LasRows:
    """Points of a .las or .laz scan, in chunks.

    Coordinates count from the smallest that the header tells: those of a map have seven digits before the point, and
    float32 keeps seven in all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.laspy = require("laspy", extra="pointcloud")
        size = path.stat().st_size
        _check_las(path, size)
        with self.laspy.open(path) as reader:
            header = reader.header
            self.count = int(header.point_count)
            if header.are_points_compressed:
                require("lazrs", extra="pointcloud")
            else:
                stored = (size - header.offset_to_point_data) // header.point_format.size
                if stored < self.count:
                    raise DataError(f"'{path}' ends after {stored} of {self.count} points.")
            self.origin = np.nan_to_num(np.asarray(reader.header.mins, dtype=np.float64))

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Indices | None) -> NDArray[np.generic]:
        """See `Rows`.

        Raises:
            DataError: The file ends too early.
        """
        taken, start = [np.empty((0, 3))], 0
        with self.laspy.open(self.path) as reader:
            for chunk in reader.chunk_iterator(max(1, _CHUNK_BYTES // reader.header.point_format.size)):
                if not len(chunk):
                    break
                stop = start + len(chunk)
                chosen: Indices | slice = slice(None)
                if indices is not None:
                    low, high = np.searchsorted(indices, (start, stop))
                    chosen = indices[low:high] - start
                axes = (chunk.x, chunk.y, chunk.z)
                taken.append(np.stack([np.asarray(axis)[chosen] for axis in axes], axis=1) - self.origin)
                start = stop
        if start < self.count:
            raise DataError(f"'{self.path}' ends after {start} of {self.count} points.")
        return np.concatenate(taken)


def _check_las(path: Path, size: int) -> None:
    """Refuse a header whose counts go beyond the file: laspy would read nothing, billions of times.

    Raises:
        DataError: They do, or it is no such header.
    """
    with path.open("rb") as stream:
        header = stream.read(375)
    if len(header) < 227 or not header.startswith(b"LASF"):
        raise DataError(f"'{path}' is no scan: it does not begin as a LAS file does.")
    header_size, points_at, records = struct.unpack_from("<HII", header, 94)
    ends = [points_at, header_size + 54 * records]
    if header[25] >= 4 and len(header) >= 247:
        later_at, later = struct.unpack_from("<QI", header, 235)
        ends += [later_at + 60 * later] if later else []
    if header[104] & 0xC0:  # compressed: eight bytes tell where the table of its chunks is
        ends.append(_chunks_end(path, points_at, size))
    if max(ends) > size:
        raise DataError(f"'{path}' ends too early: its header speaks of {max(ends)} bytes, and it has {size}.")


def _chunks_end(path: Path, points_at: int, size: int) -> int:
    """Where the compressed chunks end at the earliest: each takes a byte and more."""
    with path.open("rb") as stream:
        for place in (points_at, size - 8):  # a writer that could not go back tells it last
            stream.seek(min(max(place, 0), size))
            table_at = int.from_bytes(stream.read(8), "little", signed=True)
            if table_at != -1:
                break
        if not 0 <= table_at <= size - 8:
            return max(table_at, size) + 8
        stream.seek(table_at + 4)
        return int.from_bytes(stream.read(4), "little")


def picked(lines: Iterator[str], indices: Indices) -> Iterator[str]:
    """The items at ascending places.

    Yields:
        One after the other.
    """
    before = 0
    for index in indices.tolist():
        yield next(itertools.islice(lines, index - before, None))
        before = index + 1


@dataclass(frozen=True)
class _Header:
    format: str
    count: int
    names: tuple[str, ...]
    types: tuple[str, ...]
    size: int
    """Of the header, in bytes."""


class _PlyText:
    def __init__(self, path: Path, header: _Header) -> None:
        self.path, self.header = path, header

    def __len__(self) -> int:
        return self.header.count

    def take(self, indices: Indices | None) -> NDArray[np.generic]:
        columns = [self.header.names.index(axis) for axis in "xyz"]
        everything = np.arange(self.header.count) if indices is None else indices
        return np.loadtxt(picked(self._lines(), everything), usecols=columns, ndmin=2, comments=None)

    def _lines(self) -> Iterator[str]:
        with self.path.open("rb") as stream:
            stream.seek(self.header.size)
            count = 0
            for count, line in enumerate(itertools.islice(stream, self.header.count), start=1):  # noqa: B007 — told below
                yield line.decode("ascii")
        if count < self.header.count:
            raise DataError(f"'{self.path}' ends after {count} of {self.header.count} points.")


@dataclass(frozen=True)
class _PlyBinary:
    values: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Indices | None) -> NDArray[np.generic]:
        rows = self.values if indices is None else self.values[indices]
        return np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)


def ply_rows(path: Path) -> Rows | None:
    """The points of a .ply file without faces, whatever else they have; None for a mesh and for what is no such file.

    Raises:
        DataError: It ends too early.
    """
    with path.open("rb") as stream:
        header = _ply_header(stream)
    if header is None:
        return None
    if header.format == "ascii":
        return _PlyText(path, header)
    order = "<" if header.format == "binary_little_endian" else ">"
    fields = np.dtype([(name, order + kind) for name, kind in zip(header.names, header.types, strict=True)])
    stored = (path.stat().st_size - header.size) // fields.itemsize
    if stored < header.count:
        raise DataError(f"'{path}' ends after {stored} of {header.count} points.")
    if not header.count:
        return ArrayRows(np.empty((0, 3)))
    return _PlyBinary(np.memmap(path, dtype=fields, mode="r", offset=header.size, shape=(header.count,)))


def _ply_header(stream: BinaryIO) -> _Header | None:
    lines = []
    while stream.tell() < _LONGEST_HEADER and (line := stream.readline(_LONGEST_HEADER)):
        lines.append(line.decode("latin-1").split())
        if lines[-1] == ["end_header"]:
            break
    lines = [line for line in lines if line and line[0] not in {"comment", "obj_info"}]
    if len(lines) < 3 or lines[0] != ["ply"] or lines[-1] != ["end_header"] or len(lines[1]) != 3:
        return None
    kinds: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    for words in lines[2:-1]:
        match words:
            case ["element", name, count] if count.isdecimal() and name not in counts:
                counts[name] = int(count)
            case ["property", kind, name] if list(counts) == ["vertex"] and kind in _PLY_TYPES:
                kinds.append((name, _PLY_TYPES[kind]))
            case ["property", *_] if counts and next(iter(counts)) == "vertex" and len(counts) > 1:
                pass  # of what follows the points
            case _:
                return None
    names = tuple(name for name, _ in kinds)
    form = lines[1][1]
    is_cloud = next(iter(counts), "") == "vertex" and {"x", "y", "z"} <= set(names) and len(set(names)) == len(names)
    known = form in {"ascii", "binary_little_endian", "binary_big_endian"}
    # Strips and faces of any name make a surface.
    if not (is_cloud and known) or any(counts[name] for name in counts if name != "vertex"):
        return None
    return _Header(form, counts["vertex"], names, tuple(kind for _, kind in kinds), stream.tell())
