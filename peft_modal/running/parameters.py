"""The section of a report on what was trained, by the site it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from peft_modal.inspection.places import Group, TrainedPlace
from peft_modal.report import Block, Column, Section, Table

_TITLES: Final[dict[Group, str]] = {
    "adapter": "Adapter", "backbone": "Backbone tensors", "head": "Head", "training_only": "Training only",
}  # fmt: skip


def parameters_section(places: Iterable[TrainedPlace], *, total: int) -> Section | None:
    """Counts by group and, folded, by site; None where nothing was trained.

    Args:
        places: See `trained_places`.
        total: Parameters of backbone, adapter and head.
    """
    by_group: dict[Group, list[TrainedPlace]] = {}
    for place in places:
        by_group.setdefault(place.group, []).append(place)
    trained = sum(place.parameters for members in by_group.values() for place in members)
    if not trained:
        return None
    columns = (
        Column("Part"), Column("Tensors", "count"), Column("Parameters", "count"), Column("Of what is trained", "bar"),
        Column("Of all", "share"),
    )  # fmt: skip
    rows = []
    for group, members in by_group.items():
        count = sum(place.parameters for place in members)
        tensors = sum(len(place.tensors) for place in members)
        rows.append((_TITLES[group], tensors, count, count / trained, count / total))
    blocks: list[Block] = [Table(columns, tuple(rows))]
    blocks += [_by_site(_TITLES[group], members, trained) for group, members in by_group.items()]
    lead = f"{trained:,} of {total:,} parameters; every other one stays as it was loaded."
    return Section("parameters", "Trained parameters", tuple(blocks), lead)


def _by_site(title: str, places: Sequence[TrainedPlace], trained: int) -> Table:
    # A tensor that several places share stands once, with all of them.
    rows = [
        (
            ", ".join(place.sites) or place.role,
            place.role if place.sites else "",
            ", ".join(f"{tensor.name.rpartition('.')[2]} {_shape(tensor.shape)}" for tensor in place.tensors),
            place.parameters,
            place.parameters / trained,
        )
        for place in places
    ]
    columns = (
        Column("Site"), Column("Role"), Column("Tensors"), Column("Parameters", "count"),
        Column("Of what is trained", "share"),
    )  # fmt: skip
    shown = [i for i in range(len(columns)) if i != 1 or any(row[1] for row in rows)]
    heading = f"{title}: {len(rows)} {'site' if len(rows) == 1 else 'sites'}"
    return Table(
        tuple(columns[i] for i in shown), tuple(tuple(row[i] for i in shown) for row in rows), heading, folded=True
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"  # noqa: RUF001 — the multiplication sign is meant
