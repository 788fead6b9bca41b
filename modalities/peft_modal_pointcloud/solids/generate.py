"""From family names to solids, and from solids to point clouds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_modal.errors import ConfigError, nearest
from peft_modal_pointcloud.solids import families_downstream, families_pretrain
from peft_modal_pointcloud.solids.assembly import Assembly
from peft_modal_pointcloud.solids.corruption import scan, scan_parts, to_unit_sphere
from peft_modal_pointcloud.solids.primitives import Solids, sample_primitives, sample_surface, stack_solids

PRETRAIN_FAMILIES: tuple[str, ...] = tuple(families_pretrain.FAMILIES)
DOWNSTREAM_FAMILIES: tuple[str, ...] = tuple(families_downstream.FAMILIES)
_FAMILIES = {**families_pretrain.FAMILIES, **families_downstream.FAMILIES}
# Part of the generator: each chunk draws its numbers after the one before.
_CHUNK = 256


def make_solids(families: Sequence[str], per_family: int, *, generator: torch.Generator) -> Solids:
    """Solids of each family in turn, labelled by the family's place in `families`.

    Args:
        families: Names out of PRETRAIN_FAMILIES and DOWNSTREAM_FAMILIES.
        per_family: Solids of each family.
        generator: CPU generator, the only source of randomness.

    Raises:
        ConfigError: A name is unknown, no name is given, or `per_family` is below 1.
    """
    unknown = [name for name in families if name not in _FAMILIES]
    if unknown:
        raise ConfigError(*(f"unknown family '{name}' of solids: {nearest(name, _FAMILIES)}" for name in unknown))
    if not families or per_family < 1:
        raise ConfigError(f"need at least one family and one solid of each, got {len(families)} and {per_family}.")
    records = []
    for label, name in enumerate(families):
        assembly = Assembly(per_family, generator=generator)
        _FAMILIES[name](assembly)
        records.append(assembly.build(label))
    return stack_solids(records)


def observe(solids: Solids, *, num_points: int, generator: torch.Generator, corrupt: bool = True) -> Tensor:
    """One point cloud of every solid, (n, num_points, 3) float32, in the unit sphere.

    Args:
        solids: n solids.
        num_points: Points per cloud.
        generator: CPU generator, the only source of randomness.
        corrupt: With clutter, turn, stretch, occlusion, cut and noise; else the whole surface in its own pose.
    """
    clouds = []
    for i in range(0, len(solids), _CHUNK):
        part = solids[i : i + _CHUNK]
        if corrupt:
            clouds.append(scan(part, num_points, num_dense=_num_dense(num_points), generator=generator))
        else:
            clouds.append(to_unit_sphere(sample_surface(part, num_points, generator=generator)))
    return torch.cat(clouds)


def observe_parts(
    solids: Solids, parts: Tensor, *, num_points: int, generator: torch.Generator, corrupt: bool = True
) -> tuple[Tensor, Tensor]:
    """One point cloud of every solid as `observe` gives it, but never cluttered, and the part of each point.

    Args:
        solids: n solids of S primitives.
        parts: Part of each primitive by family, (F, S) int64.
        num_points: Points per cloud.
        generator: CPU generator, the only source of randomness.
        corrupt: With turn, stretch, occlusion, cut and noise; else the whole surface in its own pose.

    Returns:
        Points (n, num_points, 3) float32 in the unit sphere, and their parts (n, num_points) int64.
    """
    clouds, labels = [], []
    for i in range(0, len(solids), _CHUNK):
        few = solids[i : i + _CHUNK]
        if corrupt:
            points, chosen = scan_parts(few, num_points, num_dense=_num_dense(num_points), generator=generator)
        else:
            points, chosen = sample_primitives(few, num_points, generator=generator)
            points = to_unit_sphere(points)
        clouds.append(points)
        labels.append(parts[few.labels].gather(1, chosen))
    return torch.cat(clouds), torch.cat(labels)


def _num_dense(num_points: int) -> int:
    """Few points survive occlusion and cut: 2048 dense points serve up to 768."""
    return max(2048, math.ceil(num_points * 8 / 3))
