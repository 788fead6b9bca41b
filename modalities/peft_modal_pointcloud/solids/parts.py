"""The parts of the downstream families: what every primitive of a solid belongs to.

A family appends its primitives in one order, whatever its options switch off, so a part is a run of places in that
order. Nothing here draws a number or changes a solid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_modal_pointcloud.solids.primitives import MAX_PRIMITIVES

Run = tuple[str, int]
"""A part and how many primitives in a row belong to it."""

NO_PART = -1
"""The label of places that a family does not use."""

_DRAWERS_AND_LEGS: tuple[Run, ...] = (("drawers", 1), ("leg", 2))
_COLUMN_AND_FOOT: tuple[Run, ...] = (("column", 1), ("foot", 2))
_DOOR_AND_KNOB: tuple[Run, ...] = (("door", 1), ("knob", 1))

RUNS: Mapping[str, tuple[Run, ...]] = {
    "chair": (("seat", 2), ("leg", 5), ("back", 3), ("arm", 4)),
    "stool": (("seat", 3), ("leg", 4), ("footrest", 1), ("leg", 2), ("footrest", 2)),
    "sofa": (("base", 1), ("back", 1), ("arm", 4), ("cushion", 3), ("foot", 4), ("base", 1)),
    "desk": (("top", 1), *_DRAWERS_AND_LEGS, *_DRAWERS_AND_LEGS, ("panel", 1), ("hutch", 3), ("top", 1), ("leg", 1)),
    "display": (("screen", 2), ("housing", 2), ("stand", 8)),
    "bin": (("body", 2), ("rim", 3), ("lid", 4), ("wheel", 2), ("handle", 1), ("pedal", 1)),
    "bag": (("body", 5), ("pocket", 1), ("body", 1), ("handle", 2), ("strap", 2), ("flap", 1), ("strap", 1)),
    "shelf": (("side", 4), ("board", 6), ("back", 1), ("side", 1), ("content", 2)),
    "sink": (("basin", 4), ("counter", 4), ("tap", 3), ("pedestal", 1), ("cupboard", 1)),
    "toilet": (
        ("bowl", 1), ("seat", 1), ("lid", 1), ("foot", 2), ("cistern", 4), ("bowl", 1), ("wall", 1), ("cistern", 1),
    ),
    "pedestal_table": (("top", 2), *_COLUMN_AND_FOOT, *_COLUMN_AND_FOOT, ("column", 1), ("foot", 5)),
    "cabinet": (("body", 2), *_DOOR_AND_KNOB, *_DOOR_AND_KNOB, *_DOOR_AND_KNOB, *_DOOR_AND_KNOB, ("foot", 4)),
}  # fmt: skip


def part_names(families: Sequence[str]) -> tuple[str, ...]:
    """The parts `family/part` of some families, in label order."""
    return tuple(f"{family}/{part}" for family in families for part in dict.fromkeys(name for name, _ in RUNS[family]))


def part_labels(families: Sequence[str]) -> Tensor:
    """For each family the part of every primitive, (F, S) int64, as `part_names` counts them."""
    labels = {name: label for label, name in enumerate(part_names(families))}
    found = torch.full((len(families), MAX_PRIMITIVES), NO_PART)
    for row, family in enumerate(families):
        places = [labels[f"{family}/{part}"] for part, count in RUNS[family] for _ in range(count)]
        found[row, : len(places)] = torch.tensor(places)
    return found
