"""Parsed values back in YAML's own types."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import FunctionType
from typing import Any


def plain(value: object) -> Any:  # noqa: ANN401 - YAML holds anything
    """`value` as YAML would hold it; parsing the result gives `value` again.

    jsonargparse's own `dump` is not used: it writes a mapping inside `str | dict[...]` as text.

    Raises:
        TypeError: YAML has no form for it.
    """
    if isinstance(value, Enum):
        return value.name  # before text and numbers: a StrEnum is text as well
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, convert in _CONVERSIONS.items():
        if isinstance(value, kind):
            return convert(value)
    return _plain_mapping(value)


def _plain_mapping(value: object) -> dict[Any, Any]:
    from jsonargparse import Namespace

    if isinstance(value, Namespace):
        value = vars(value)
    elif dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} has no form in YAML")
    return {key: plain(item) for key, item in value.items()}


def _import_path(value: type | FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _plain_items(value: Iterable[object]) -> list[Any]:
    return [plain(item) for item in value]


_CONVERSIONS: dict[type, Callable[[Any], Any]] = {
    list: _plain_items,
    tuple: _plain_items,
    set: lambda value: sorted(_plain_items(value), key=repr),
    frozenset: lambda value: sorted(_plain_items(value), key=repr),
    type: _import_path,
    FunctionType: _import_path,
    os.PathLike: os.fspath,
    datetime.timedelta: str,
}
