"""Pickles that data sets are published as, opened without letting them do anything.

A pickle is a program. This reader runs the few instructions that rebuild NumPy arrays, numbers, text, lists, tuples and
dictionaries, on stand-ins of its own: no name in the file is imported, and no NumPy code sees a state from the file. Of
objects of classes that a caller names, attributes are taken and no code is run.
"""

from __future__ import annotations

import math
import pickle  # noqa: TID251 — the machine that reads instructions; every name they look up is answered here
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from peft_modal.errors import ConfigError, DataError

_DTYPE: Final = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_DEEPEST: Final = 32


def read_pickle(path: Path, *, allowed: bool, records: Collection[str] = ()) -> Any:  # noqa: ANN401 — whatever lies in it
    """What a pickle holds: NumPy arrays of numbers, numbers, text, and lists, tuples and dictionaries of these.

    Args:
        path: The file.
        allowed: The user's `data.allow_pickle`.
        records: Full names of classes whose objects become dictionaries of their attributes; the classes themselves
            are neither imported nor needed.

    Raises:
        ConfigError: The user has not allowed it.
        DataError: The file is missing or damaged, or holds anything else, which is named.
    """
    if not path.is_file():
        raise DataError(f"'{path}' does not exist or is not a file.")
    if not allowed:
        raise ConfigError(
            f"data.allow_pickle: '{path}' is a pickle, a kind of file that can run code; set it to true to read the "
            "arrays, numbers and text in it, and nothing else."
        )
    try:
        with path.open("rb") as stream:
            return _plain(_Reader(_Bounded(stream, path.stat().st_size), records).load(), {}, 0)
    except _RefusedError as refused:
        raise DataError(
            f"'{path}' holds {refused}, which is not opened; expected arrays, numbers, text, and lists, tuples and "
            "dictionaries of these."
        ) from refused
    except Exception as error:  # a damaged program fails in every way there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{path}' cannot be read as a pickle: {reason}") from error


class _RefusedError(Exception):
    """Something that this reader does not make; its text is the name."""


class _Bounded:
    """A file that refuses to read past its end, before memory is taken for it."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size
        self.readline = stream.readline

    def read(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise EOFError("it ends too early")
        return self.stream.read(count)


class _Standin:
    """What a name in the file gets in place of what it names. It can be called, and nothing else."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *args: object) -> object:
        return self._make(*args)

    def __setstate__(self, state: object) -> NoReturn:
        # Without this, the instruction that sets a state would write into this object.
        raise ValueError("it changes what it has only named")


class _Dtype:
    """A type of numbers; the state of the file may set its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object = None, *_flags: object) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"an array of type {code!r}")
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[0] in "<>|=" else "="

    def __setstate__(self, state: tuple[object, ...]) -> None:
        order = state[1]
        if order not in {"<", ">", "|", "="}:
            raise ValueError(f"there is no byte order {order!r}")
        self.order = str(order)

    def real(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """An array whose content is given later."""

    __slots__ = ("value",)

    def __init__(self, value: NDArray[Any] | None = None) -> None:
        self.value = value

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _version, shape, dtype, fortran, content = state
        self.value = _array(content, dtype, shape, "F" if fortran else "C")


class _Scalar:
    """A NumPy number."""

    __slots__ = ("value",)

    def __init__(self, dtype: object, content: object) -> None:
        self.value: int | float | bool = _array(content, dtype, (), "C").item()


class _Record:
    """An object of which the attributes are wanted, whatever its class."""

    __slots__ = ("attributes",)
    attributes: object

    def __new__(cls) -> _Record:
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: object) -> None:
        self.attributes = state


def _array(content: object, dtype: object, shape: object, order: str) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype):
        raise _RefusedError("an array of no known type")
    if isinstance(content, str):  # as Python 2 wrote bytes
        content = content.encode("latin-1")
    if not isinstance(content, bytes | bytearray):
        raise _RefusedError(f"an array made of {type(content).__name__}")
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes):
        raise ValueError(f"an array cannot have the shape {shape!r}")
    real = dtype.real()
    if math.prod(sizes) * real.itemsize != len(content):
        raise ValueError(f"an array of shape {shape!r} has {len(content)} bytes of {real}")
    values: NDArray[Any] = np.frombuffer(content, dtype=real)
    return values.reshape(sizes, order="F" if order == "F" else "C")


def _reconstruct(*_of: object) -> _Array:
    return _Array()


def _from_buffer(content: object, dtype: object, shape: object, order: object = "C", *_axes: object) -> _Array:
    return _Array(_array(content, dtype, shape, str(order)))


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1"}:
        raise _RefusedError(f"text in the encoding {encoding!r}")
    return text.encode("latin-1")


def _no_bytes(*args: object) -> bytes:
    if args:
        raise _RefusedError("bytes made by a call")
    return b""


def _only_named(*_args: object) -> NoReturn:
    raise _RefusedError("an array made by another way than NumPy's own")


_NAMES: Final[Mapping[str, Callable[..., object]]] = MappingProxyType(
    {
        "numpy.ndarray": _only_named,
        "numpy.dtype": _Dtype,
        "_codecs.encode": _encode,
        "__builtin__.bytes": _no_bytes,
        "builtins.bytes": _no_bytes,
        # NumPy 2 calls `numpy.core` `numpy._core`.
        **{
            f"numpy.{core}.{name}": make
            for core in ("core", "_core")
            for name, make in (
                ("multiarray._reconstruct", _reconstruct),
                ("multiarray.scalar", _Scalar),
                ("numeric._frombuffer", _from_buffer),
            )
        },
    }
)


class _Reader(pickle._Unpickler):  # noqa: SLF001 — see below
    """Reads instructions in Python: the reader in C takes gigabytes for a number in the file."""

    def __init__(self, file: _Bounded, records: Collection[str]) -> None:
        super().__init__(file, encoding="latin-1")
        self.records = frozenset(records)

    def find_class(self, module: str, name: str) -> _Standin | type[_Record]:
        full = f"{module}.{name}"
        if full in self.records:
            return _Record
        if full not in _NAMES:
            raise _RefusedError(f"an object of {full}")
        return _Standin(_NAMES[full])

    def get_extension(self, code: int) -> NoReturn:
        raise _RefusedError(f"an object of the registered extension {code}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise _RefusedError(f"a reference to {pid!r} outside of the file")


def _plain(value: object, known: dict[int, object], depth: int) -> object:
    """The value with arrays in place of stand-ins; what occurs twice is made once.

    Raises:
        _RefusedError: It holds something else, or itself.
        ValueError: An array was begun and never filled.
    """
    if type(value) in {int, float, bool, str}:
        return value
    if isinstance(value, _Array | _Scalar):
        if value.value is None:
            raise ValueError("an array has no content")
        return value.value
    if isinstance(value, _Record):
        value = value.attributes
    if type(value) not in {list, tuple, dict}:
        raise _RefusedError(f"a value of type {type(value).__name__.lstrip('_').lower()}")
    if depth > _DEEPEST:
        raise _RefusedError(f"lists in lists deeper than {_DEEPEST}, or one in itself")
    if id(value) in known:
        return known[id(value)]
    made: object
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise _RefusedError("a dictionary whose keys are neither text nor whole numbers")
        made = {key: _plain(item, known, depth + 1) for key, item in value.items()}
    else:
        assert isinstance(value, list | tuple)
        items = [_plain(item, known, depth + 1) for item in value]
        made = items if isinstance(value, list) else tuple(items)
    known[id(value)] = made
    return made
