"""How many classes a configuration has, when nobody has looked at the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

from peft_modal.compose import Composed

ASSUMED_CLASSES: Final = 10
"""What totals are given for when nothing tells the number of classes; the output says so."""

ClassSource = Literal["data", "option", "assumed"]


@runtime_checkable
class NamesClasses(Protocol):
    """A data class that knows its classes from its arguments alone, as generated sets and public benchmarks do."""

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Names in label order, or None where the arguments do not decide them.

        Args:
            arguments: Every constructor argument with its value; nothing is read from disk.
        """
        ...


@dataclass(frozen=True)
class Classes:
    """The number of classes and where it comes from."""

    count: int
    source: ClassSource
    names: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each, for tasks that want one."""
        return self.names or tuple(f"class {index}" for index in range(self.count))


def classes_of(composed: Composed, given: int | None) -> Classes:
    """The classes of a configuration.

    Args:
        composed: The configuration; its data is not built.
        given: What was asked for; goes before what the data says.
    """
    if given is not None:
        return Classes(given, "option")
    node = composed.nodes.get("data")
    if node is not None and isinstance(node.cls, NamesClasses):
        names = node.cls.class_names_without_data(node.kwargs)
        if names is not None:
            return Classes(len(names), "data", tuple(names))
    return Classes(ASSUMED_CLASSES, "assumed")
