"""The section of a report on what was trained, by the site it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from peft_modal.inspection.places import Group, TrainedPlace
from peft_modal.report import Block, Chart, Column, Section, Table, heat_chart

_TITLES: Final[dict[Group, str]] = {
    "adapter": "Adapter", "backbone": "Backbone tensors", "head": "Head", "training_only": "Training only",
}  # fmt: skip


def parameters_section(
    places: Iterable[TrainedPlace], *, total: int, chosen: Mapping[str, int] = MappingProxyType({})
) -> Section | None:
    """Counts by group, over the blocks and, folded, by site; None where nothing was trained.

    Args:
        places: See `trained_places`.
        total: Parameters of backbone, adapter and head.
        chosen: See `LifeCycle.site_entries`.
    """
    places = list(places)
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
    blocks: list[Block] = [Table(columns, tuple(rows)), *_over_blocks(places, chosen)]
    blocks += [_by_site(_TITLES[group], members, trained) for group, members in by_group.items()]
    lead = f"{trained:,} of {total:,} parameters; every other one stays as it was loaded."
    return Section("parameters", "Trained parameters", tuple(blocks), lead)


def _over_blocks(places: Sequence[TrainedPlace], chosen: Mapping[str, int]) -> list[Chart]:
    """Where the parameters lie, and where the entries that the method chose: role against block, one chart a stack."""
    charts = []
    where = [place for place in places if place.group in {"adapter", "backbone"} and len(place.blocks) == 1]
    for stack in dict.fromkeys(place.stack for place in where):
        own = [place for place in where if place.stack == stack]
        prefix = f"{stack}: " if stack and len({place.stack for place in where}) > 1 else ""
        trained = [(place.role, place.blocks[0], place.parameters) for place in own]
        charts += _grid(trained, "Trained parameters", f"{prefix}Trained parameters over the blocks")
        at = {site: (place.role, place.blocks[0]) for place in own for site in place.sites if site in chosen}
        entries = [(role, block, chosen[site]) for site, (role, block) in at.items()]
        charts += _grid(entries, "Entries", f"{prefix}Entries of the weights that the method chose")
    return charts


def _grid(counts: Sequence[tuple[str, int, int]], what: str, title: str) -> list[Chart]:
    """A chart of (role, block, count), where there are two blocks or more."""
    blocks = sorted({block for _, block, _ in counts})
    if len(blocks) < 2:
        return []
    sums: dict[tuple[str, int], int] = {}
    for role, block, count in counts:
        sums[role, block] = sums.get((role, block), 0) + count
    roles = list(dict.fromkeys(role for role, _, _ in counts))
    every = range(blocks[0], blocks[-1] + 1)
    cells = [[sums.get((role, block)) for block in every] for role in roles]
    return [heat_chart(roles, [str(block) for block in every], cells, what=what, across="Block", title=title)]


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
