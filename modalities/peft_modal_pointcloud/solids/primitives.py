"""Solids as packed primitives: the record, its surface areas, and points drawn uniformly from its surface."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MAX_PRIMITIVES = 14
BOX, FRUSTUM, ELLIPSOID, TORUS = range(4)
# Bounds the memory of one pass; part of the generator, because every pass draws its numbers in turn.
_CHUNK = 128


@dataclass(frozen=True, eq=False)
class Solids:
    """n solids of S primitives each; y is up. A primitive stands at `centre`, turned by `rotation` (p = R q + c).

    The four numbers of `shape` mean, by `kind`:
    box: half width, half height, half depth, 1 if the top face (+y) is missing;
    frustum about y: bottom radius, top radius, half height, caps (0 none, 1 bottom, 2 top, 3 both);
    ellipsoid: three radii, sine of the lowest latitude (-1 whole, 0 dome);
    torus about y: ring radius, tube radius, arc angle centred on +x, stretch along z.
    """

    kind: Tensor
    """(n, S) int64, one of BOX, FRUSTUM, ELLIPSOID, TORUS."""
    shape: Tensor
    """(n, S, 4) float32."""
    centre: Tensor
    """(n, S, 3) float32."""
    rotation: Tensor
    """(n, S, 3, 3) float32."""
    on: Tensor
    """(n, S) bool; a primitive that is off has no surface."""
    labels: Tensor
    """(n,) int64, index of the family."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Solids:
        return Solids(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def stack_solids(solids: list[Solids]) -> Solids:
    """One record with all solids, in order; every record must have the same number S of primitives."""
    return Solids(**{f.name: torch.cat([getattr(s, f.name) for s in solids]) for f in fields(Solids)})


def surface_area(solids: Solids) -> Tensor:
    """Surface areas (n, S) float32, zero where off.

    Exact for boxes, frusta, spheres and unstretched tori. Ellipsoids take Thomsen's formula (within 1.1 %), of which
    a dome counts its share of the height; a stretched torus counts the mean of its two half axes.
    """
    a, b, c, d = solids.shape.unbind(-1)
    box = _box_faces(solids.shape).sum(-1)
    frustum = _frustum_faces(solids.shape).sum(-1)
    power = 1.6075
    mean = ((a * b) ** power + (a * c) ** power + (b * c) ** power) / 3
    ellipsoid = 4 * math.pi * mean ** (1 / power) * (1 - d) / 2
    torus = 2 * math.pi * b * a * c * (1 + d) / 2
    areas = torch.stack([box, frustum, ellipsoid, torus], dim=-1)
    return areas.gather(-1, solids.kind[..., None]).squeeze(-1) * solids.on


def sample_surface(
    solids: Solids, num_points: int, *, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Points (n, num_points, 3) float32 on the surfaces; points inside another primitive stay.

    Args:
        solids: n solids of S primitives.
        num_points: Points per solid.
        generator: CPU generator, the only source of randomness.
        weights: (n, S) share of the points per primitive; default its surface area.
    """
    return sample_primitives(solids, num_points, generator=generator, weights=weights)[0]


def sample_primitives(
    solids: Solids, num_points: int, *, generator: torch.Generator, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The points of `sample_surface`, and the primitive (n, num_points) int64 that each of them lies on."""
    weights = surface_area(solids) if weights is None else weights
    chunks = [
        _sample_chunk(solids[i : i + _CHUNK], weights[i : i + _CHUNK], num_points, generator)
        for i in range(0, len(solids), _CHUNK)
    ]
    if not chunks:
        return torch.empty(0, num_points, 3), torch.empty(0, num_points, dtype=torch.int64)
    points, chosen = zip(*chunks, strict=True)
    return torch.cat(points), torch.cat(chosen)


def _sample_chunk(
    solids: Solids, weights: Tensor, num_points: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    n = len(solids)
    u = torch.rand(n, num_points, 5, generator=generator)
    cumulative = weights.cumsum(-1)
    cumulative = (cumulative / cumulative[:, -1:]).contiguous()
    # right=True steps over primitives of weight zero, whose cumulative share repeats their predecessor's.
    chosen = torch.searchsorted(cumulative, u[..., 4].contiguous(), right=True).clamp_(max=weights.shape[1] - 1)
    row = torch.arange(n)[:, None].expand_as(chosen)
    kind = solids.kind[row, chosen]
    shape = solids.shape[row, chosen]
    local = torch.empty(n, num_points, 3)
    for value, formula in enumerate((_on_box, _on_frustum, _on_ellipsoid, _on_torus)):
        mask = kind == value
        local[mask] = formula(shape[mask], u[mask])
    world = (solids.rotation[row, chosen] * local[..., None, :]).sum(-1)  # (n, P, 3, 3) * (n, P, 1, 3)
    return world + solids.centre[row, chosen], chosen


def _box_faces(shape: Tensor) -> Tensor:
    """Areas (..., 6) of the faces -x, +x, -y, +y, -z, +z."""
    x, y, z, is_open = shape.unbind(-1)
    side, floor, front = 4 * y * z, 4 * x * z, 4 * x * y
    return torch.stack([side, side, floor, floor * (1 - is_open), front, front], dim=-1)


def _frustum_faces(shape: Tensor) -> Tensor:
    """Areas (..., 3) of the mantle, the bottom cap and the top cap."""
    bottom, top, half, caps = shape.unbind(-1)
    mantle = math.pi * (bottom + top) * torch.hypot(top - bottom, 2 * half)
    has_bottom, has_top = caps % 2, torch.floor(caps / 2)
    return torch.stack([mantle, math.pi * bottom**2 * has_bottom, math.pi * top**2 * has_top], dim=-1)


def _pick(faces: Tensor, u: Tensor) -> Tensor:
    """Index (m,) of a face drawn in proportion to the areas (m, F) by the uniform numbers u (m,)."""
    cumulative = faces.cumsum(-1)
    cumulative = (cumulative / cumulative[:, -1:]).contiguous()
    return torch.searchsorted(cumulative, u[:, None].contiguous(), right=True).squeeze(1).clamp_(max=faces.shape[1] - 1)


def _on_box(shape: Tensor, u: Tensor) -> Tensor:
    face = _pick(_box_faces(shape), u[:, 3])
    unit = 2 * u[:, :3] - 1
    unit.scatter_(1, (face // 2)[:, None], (face % 2 * 2 - 1)[:, None].to(unit.dtype))
    return unit * shape[:, :3]


def _on_frustum(shape: Tensor, u: Tensor) -> Tensor:
    bottom, top, half, _ = shape.unbind(-1)
    face = _pick(_frustum_faces(shape), u[:, 3])
    # Height with density proportional to the radius there; this form has no singularity at equal radii.
    root = (bottom**2 + u[:, 0] * (top**2 - bottom**2)).clamp(min=0).sqrt()
    t = u[:, 0] * (bottom + top) / (bottom + root).clamp(min=1e-12)
    mantle = face == 0
    radius = torch.where(mantle, bottom + (top - bottom) * t, torch.where(face == 1, bottom, top) * u[:, 0].sqrt())
    y = torch.where(mantle, (2 * t - 1) * half, torch.where(face == 1, -half, half))
    angle = 2 * math.pi * u[:, 1]
    return torch.stack([radius * angle.cos(), y, radius * angle.sin()], dim=-1)


def _on_ellipsoid(shape: Tensor, u: Tensor) -> Tensor:
    """Uniform on the unit sphere above the lowest latitude, then scaled: denser where the surface is squeezed."""
    lowest = shape[:, 3]
    sine = lowest + (1 - lowest) * u[:, 0]
    cosine = (1 - sine**2).clamp(min=0).sqrt()
    angle = 2 * math.pi * u[:, 1]
    return torch.stack([cosine * angle.cos(), sine, cosine * angle.sin()], dim=-1) * shape[:, :3]


def _on_torus(shape: Tensor, u: Tensor) -> Tensor:
    ring, tube, arc, stretch = shape.unbind(-1)
    along = (u[:, 0] - 0.5) * arc
    around = 2 * math.pi * u[:, 1]
    # The outer half of the tube has more surface: reflecting an inner point with this probability is exact.
    keep = u[:, 2] < (1 + tube / ring.clamp(min=1e-12) * around.cos()) / 2
    around = torch.where(keep, around, math.pi - around)
    radius = ring + tube * around.cos()
    return torch.stack([radius * along.cos(), tube * around.sin(), radius * along.sin() * stretch], dim=-1)
