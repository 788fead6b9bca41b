"""What a report is made of: a few kinds of content that know nothing of tasks or modalities.

Each has a `to_dict` for the JSON twin; the page shows the same values, formatted by `peft_modal.report.numbers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from peft_modal.report.numbers import Kind

Cell: TypeAlias = str | int | float | None
Mood: TypeAlias = Literal["right", "wrong", "plain"]


@dataclass(frozen=True)
class Fact:
    """One value with its name."""

    label: str
    value: Cell
    kind: Kind = "text"
    note: str = ""
    """A few words that put the value in its place."""

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"label": self.label, "value": self.value, "kind": self.kind, "note": self.note}


@dataclass(frozen=True)
class Facts:
    """A list of names and values."""

    template: ClassVar = "facts"
    items: tuple[Fact, ...]

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"type": "facts", "items": [item.to_dict() for item in self.items]}


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    template: ClassVar = "text"
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"type": "text", "text": self.text}


@dataclass(frozen=True)
class Code:
    """Text to be copied, such as a command or a configuration."""

    template: ClassVar = "code"
    text: str
    title: str = ""
    folded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"type": "code", "title": self.title, "text": self.text}


@dataclass(frozen=True)
class Column:
    """Heading and kind of a table's column; `bar` is a share with a bar behind it."""

    name: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """Rows of values; every row has one cell per column."""

    template: ClassVar = "table"
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    folded: bool = False
    """Whether only the title is shown until a reader opens it."""

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        columns = [{"name": column.name, "kind": column.kind} for column in self.columns]
        return {"type": "table", "title": self.title, "columns": columns, "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True)
class Chart:
    """A drawing made of numbers."""

    template: ClassVar = "chart"
    data: Mapping[str, Any]
    """The numbers that are drawn, as JSON takes them."""
    draw: Callable[[Any], None] = field(compare=False)
    """Draws `data` on an empty matplotlib figure, in the style of `peft_modal.report.style`."""
    width: float
    """In CSS pixels."""
    height: float
    label: str
    """What it shows, for those who do not see it."""
    title: str = ""
    shrinks: bool = True
    """Whether it may be shown smaller on a narrow window; else it scrolls inside its own box."""

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"type": "chart", "title": self.title, "label": self.label, "data": dict(self.data)}


@dataclass(frozen=True)
class Tile:
    """One sample of a gallery."""

    title: str
    """The first line below the picture."""
    sample: Mapping[str, Any] = field(compare=False)
    """One element of a batch, without the batch axis; the modality's renderer draws it."""
    prediction: Mapping[str, Any] | None = None
    """The task's own row for it."""
    facts: tuple[Fact, ...] = ()
    mood: Mood = "plain"

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin; pictures are in the page only."""
        return {
            "title": self.title,
            "mood": self.mood,
            "facts": [fact.to_dict() for fact in self.facts],
            "prediction": None if self.prediction is None else dict(self.prediction),
        }


@dataclass(frozen=True)
class Gallery:
    """Samples, drawn by the renderer of their modality."""

    template: ClassVar = "gallery"
    tiles: tuple[Tile, ...]
    title: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"type": "gallery", "title": self.title, "tiles": [tile.to_dict() for tile in self.tiles]}


@dataclass(frozen=True)
class Row:
    """Content side by side where the window is wide enough."""

    template: ClassVar = "row"
    blocks: tuple[Block, ...]

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"type": "row", "blocks": [block.to_dict() for block in self.blocks]}


Block: TypeAlias = Facts | Text | Code | Table | Chart | Gallery | Row


@dataclass(frozen=True)
class Section:
    """A chapter of a report."""

    key: str
    """Letters, digits and `-`: its name in the JSON twin and its anchor on the page."""
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""
    """One sentence below the title."""

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON twin."""
        return {"title": self.title, "lead": self.lead, "blocks": [block.to_dict() for block in self.blocks]}


@dataclass(frozen=True)
class Report:
    """Everything that one report says."""

    FORMAT_VERSION: ClassVar = 1
    kind: str
    """What was done: `fit`, `test`."""
    title: str
    lead: str
    """Below the title: one or two short sentences."""
    facts: tuple[Fact, ...]
    """What a reader judges by in ten seconds."""
    sections: tuple[Section, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All figures, flat, as in `metrics.json`."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON twin.

        Raises:
            ValueError: Two sections have one key.
        """
        keys = [section.key for section in self.sections]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"several sections of a report are called {', '.join(twice)}")
        return {
            "format_version": self.FORMAT_VERSION,
            "kind": self.kind,
            "title": self.title,
            "lead": self.lead,
            "facts": [fact.to_dict() for fact in self.facts],
            "sections": {section.key: section.to_dict() for section in self.sections},
            "metrics": dict(self.metrics),
        }


def galleries(blocks: Sequence[Block]) -> list[Gallery]:
    """Every gallery among the blocks, in the order of the page."""
    found: list[Gallery] = []
    for block in blocks:
        if isinstance(block, Gallery):
            found.append(block)
        elif isinstance(block, Row):
            found += galleries(block.blocks)
    return found
