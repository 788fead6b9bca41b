"""The trained parameters of a run, by the site they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from peft_modal.anatomy import Anatomy
from peft_modal.report import Block, Column, Section, Table
from peft_modal.tasks.base import Task

TRAINING_ONLY: Final = "training only"
_PARTS: Final = {"adapter": "adapter", "backbone": "backbone tensors", "head": "head"}


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor."""

    part: str
    """`adapter`, `backbone tensors`, `head`, or `training only` for what the adapter file does not hold."""
    site: str
    """Site, port or module that it belongs to."""
    role: str
    """Role of that site or port, "" for a module."""
    name: str
    """Its name there."""
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def trained_shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that is trained now, by name in the adapter file."""
    return {name: tuple(parameter.shape) for name, parameter in task.named_trained().items()}


def trained_tensors(
    shapes: Mapping[str, tuple[int, ...]], anatomy: Anatomy, *, saved: Iterable[str]
) -> list[TrainedTensor]:
    """Trained tensors with their places.

    Args:
        shapes: See `trained_shapes`.
        anatomy: The backbone's.
        saved: Names in the adapter file; what was trained and is not among them served training only.
    """
    roles = {port.name: port.role for port in anatomy.ports} | {site.name: site.role for site in anatomy.sites}
    by_path = {site.path: site.name for site in anatomy.sites if site.rows is None}
    kept = set(saved)
    found = []
    for name, shape in shapes.items():
        part, _, path = name.partition(".")
        site = _site(path, roles, by_path)
        own = path.removeprefix(site).lstrip(".") or path.rpartition(".")[2]
        found.append(
            TrainedTensor(_PARTS[part] if name in kept else TRAINING_ONLY, site, roles.get(site, ""), own, shape)
        )
    return found


def _site(path: str, names: Mapping[str, str], by_path: Mapping[str, str]) -> str:
    """The site of that stored tensor, else the longest site or port name at the path's start, else its module."""
    if path in by_path:
        return by_path[path]
    steps = path.split(".")
    starts = (".".join(steps[:end]) for end in range(len(steps), 0, -1))
    return next((start for start in starts if start in names), path.rpartition(".")[0] or path)


def parameters_section(tensors: Iterable[TrainedTensor], *, total: int) -> Section | None:
    """Counts by part and, folded, by site; None where nothing was trained.

    Args:
        tensors: What was trained.
        total: Parameters of backbone, adapter and head.
    """
    by_part: dict[str, list[TrainedTensor]] = {}
    for part in (*_PARTS.values(), TRAINING_ONLY):
        members = [tensor for tensor in tensors if tensor.part == part]
        if members:
            by_part[part] = members
    trained = sum(tensor.count for members in by_part.values() for tensor in members)
    if not trained:
        return None
    columns = (
        Column("Part"), Column("Tensors", "count"), Column("Parameters", "count"), Column("Of what is trained", "bar"),
        Column("Of all", "share"),
    )  # fmt: skip
    rows = tuple(
        (_capital(part), len(members), count := sum(tensor.count for tensor in members), count / trained, count / total)
        for part, members in by_part.items()
    )
    blocks: list[Block] = [Table(columns, rows)]
    blocks += [_by_site(part, members, trained) for part, members in by_part.items()]
    lead = f"{trained:,} of {total:,} parameters; every other one stays as it was loaded."
    return Section("parameters", "Trained parameters", tuple(blocks), lead)


def _by_site(part: str, tensors: list[TrainedTensor], trained: int) -> Table:
    sites: dict[tuple[str, str], list[TrainedTensor]] = {}
    for tensor in tensors:
        sites.setdefault((tensor.site, tensor.role), []).append(tensor)
    rows = []
    for (site, role), members in sites.items():
        count = sum(tensor.count for tensor in members)
        named = ", ".join(f"{tensor.name} {_shape(tensor.shape)}" for tensor in members)
        rows.append((site, role, named, count, count / trained))
    columns = (
        Column("Site"), Column("Role"), Column("Tensors"), Column("Parameters", "count"),
        Column("Of what is trained", "share"),
    )  # fmt: skip
    shown = [i for i in range(len(columns)) if i != 1 or any(row[1] for row in rows)]
    title = f"{_capital(part)}: {len(rows)} {'site' if len(rows) == 1 else 'sites'}"
    return Table(
        tuple(columns[i] for i in shown), tuple(tuple(row[i] for i in shown) for row in rows), title, folded=True
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"  # noqa: RUF001 — the multiplication sign is meant


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
