"""What a scan does to a solid: clutter, a turn, a stretch, hidden surfaces, missing parts, few noisy points.

Every step works on the whole batch at once and draws from the generator passed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_modal_pointcloud.solids.assembly import turn_about
from peft_modal_pointcloud.solids.primitives import (
    BOX,
    ELLIPSOID,
    Solids,
    sample_primitives,
    sample_surface,
    surface_area,
)

_CELLS = 28
_DEPTH_TOLERANCE = 0.12
_PROBE_POINTS = 192


def to_unit_sphere(points: Tensor) -> Tensor:
    """Clouds (n, P, 3) with their mean at the origin and their farthest point at distance 1."""
    centred = points - points.mean(1, keepdim=True)
    return centred / centred.norm(dim=-1).amax(1)[:, None, None].clamp(min=1e-9)


def scan(solids: Solids, num_points: int, *, num_dense: int, generator: torch.Generator) -> Tensor:
    """Corrupted clouds (n, num_points, 3) float32 in the unit sphere, seen from one or two sides.

    Args:
        solids: n solids.
        num_points: Points per cloud. Where fewer are visible, they are repeated (and jittered apart).
        num_dense: Surface points per solid that the corruption starts from.
        generator: CPU generator, the only source of randomness.
    """
    cluttered, weights = _add_clutter(solids, generator)
    points = sample_surface(cluttered, num_dense, generator=generator, weights=weights)
    return _observed(points, num_points, generator)[0]


def scan_parts(solids: Solids, num_points: int, *, num_dense: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The clouds of `scan` without clutter, and the primitive (n, num_points) int64 that each point lies on."""
    points, chosen = sample_primitives(solids, num_dense, generator=generator)
    points, index = _observed(points, num_points, generator)
    return points, chosen.gather(1, index)


def _observed(points: Tensor, num_points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a scan sees of dense points (n, P, 3), (n, num_points, 3), and which of them that are."""
    n = len(points)
    turn = turn_about("y", torch.rand(n, generator=generator) * 2 * math.pi)
    stretch = 0.8 + 0.4 * torch.rand(n, 1, 3, generator=generator)
    points = to_unit_sphere(points @ turn.transpose(1, 2) * stretch)
    alive = _visible(points, generator)
    alive = _cut(points, alive, generator)
    index = _draw(alive, num_points, generator)
    points = points.gather(1, index[..., None].expand(-1, -1, 3))
    sigma = 0.02 * torch.rand(n, 1, 1, generator=generator)
    return to_unit_sphere(points + sigma * torch.randn(points.shape, generator=generator)), index


def _add_clutter(solids: Solids, generator: torch.Generator) -> tuple[Solids, Tensor]:
    """Solids with four more primitives (floor, wall, loose box, loose ellipsoid) and the weights of all primitives.

    Clutter that is on gets 5 to 30 % of the points together.
    """
    n = len(solids)
    probe = sample_surface(solids, _PROBE_POINTS, generator=generator)
    low, high = probe.amin(1), probe.amax(1)
    centre, reach = (low + high) / 2, (high - low).norm(dim=-1) / 2
    floor = low[:, 1]

    def uniform(a: float, b: float) -> Tensor:
        return a + (b - a) * torch.rand(n, generator=generator)

    def beside(distance: Tensor, y: Tensor, angle: Tensor) -> Tensor:
        return torch.stack([centre[:, 0] + distance * angle.cos(), y, centre[:, 2] + distance * angle.sin()], dim=-1)

    zero, thin = torch.zeros(n), 0.01 * reach
    on = torch.rand(n, 4, generator=generator) < torch.tensor([0.6, 0.35, 0.4, 0.4])
    patch = torch.stack([reach * uniform(0.5, 1.2), thin, reach * uniform(0.5, 1.2), zero], dim=-1)
    patch_at = beside(reach * uniform(0.0, 0.3), floor, uniform(0.0, 2 * math.pi))
    wall_angle = uniform(0.0, 2 * math.pi)
    wall_high = reach * uniform(0.4, 1.0)
    wall = torch.stack([thin, wall_high, reach * uniform(0.4, 1.0), zero], dim=-1)
    wall_at = beside(reach * uniform(0.7, 1.0), floor + wall_high, wall_angle)
    box = torch.cat([reach[:, None] * (0.08 + 0.17 * torch.rand(n, 3, generator=generator)), zero[:, None]], dim=-1)
    box_at = beside(reach * uniform(0.7, 1.1), floor + box[:, 1], uniform(0.0, 2 * math.pi))
    ball = torch.cat(
        [reach[:, None] * (0.08 + 0.17 * torch.rand(n, 3, generator=generator)), zero[:, None] - 1], dim=-1
    )
    ball_at = beside(reach * uniform(0.7, 1.1), floor + ball[:, 1], uniform(0.0, 2 * math.pi))
    spin = [turn_about("y", uniform(0.0, 2 * math.pi)) for _ in range(3)]
    clutter = Solids(
        kind=torch.tensor([BOX, BOX, BOX, ELLIPSOID]).expand(n, 4),
        shape=torch.stack([patch, wall, box, ball], dim=1),
        centre=torch.stack([patch_at, wall_at, box_at, ball_at], dim=1),
        # A wall's normal points from it to the solid.
        rotation=torch.stack([spin[0], turn_about("y", -wall_angle), spin[1], spin[2]], dim=1),
        on=on,
        labels=solids.labels,
    )
    joined = Solids(
        kind=torch.cat([solids.kind, clutter.kind], dim=1),
        shape=torch.cat([solids.shape, clutter.shape], dim=1),
        centre=torch.cat([solids.centre, clutter.centre], dim=1),
        rotation=torch.cat([solids.rotation, clutter.rotation], dim=1),
        on=torch.cat([solids.on, clutter.on], dim=1),
        labels=solids.labels,
    )
    share = torch.where(on.any(1), uniform(0.05, 0.3), zero)[:, None]
    own, extra = surface_area(solids), surface_area(clutter)
    own = own / own.sum(1, keepdim=True) * (1 - share)
    extra = extra / extra.sum(1, keepdim=True).clamp(min=1e-12) * share
    return joined, torch.cat([own, extra], dim=1)


def _visible(points: Tensor, generator: torch.Generator) -> Tensor:
    """(n, P) bool: within 0.12 of the front in a 28x28 depth buffer, from one viewpoint or from either of two."""
    n = len(points)
    second = torch.rand(n, generator=generator) < 0.5
    seen = torch.zeros(points.shape[:2], dtype=torch.bool)
    for view in range(2):
        azimuth = torch.rand(n, generator=generator) * 2 * math.pi
        elevation = 0.05 + 0.75 * torch.rand(n, generator=generator)
        zero = torch.zeros(n)
        towards = torch.stack(
            [elevation.cos() * azimuth.cos(), elevation.sin(), elevation.cos() * azimuth.sin()], dim=-1
        )
        right = torch.stack([-azimuth.sin(), zero, azimuth.cos()], dim=-1)
        axes = torch.stack([right, torch.linalg.cross(towards, right), towards], dim=-1)
        across, up, depth = (points @ axes).unbind(-1)
        column, row = (((v + 1) / 2 * _CELLS).long().clamp(0, _CELLS - 1) for v in (across, up))
        cell = row * _CELLS + column
        front = torch.full((n, _CELLS**2), -torch.inf).scatter_reduce(1, cell, depth, "amax")
        in_front = depth > front.gather(1, cell) - _DEPTH_TOLERANCE
        seen |= in_front if view == 0 else in_front & second[:, None]
    return seen


def _cut(points: Tensor, alive: Tensor, generator: torch.Generator) -> Tensor:
    """`alive` without the 0 to 30 % of its points that lie farthest in a random direction, for 60 % of the clouds."""
    n = len(points)
    share = 0.3 * torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.6)
    direction = torch.nn.functional.normalize(torch.randn(n, 3, 1, generator=generator), dim=1)
    along = (points @ direction).squeeze(-1).masked_fill(~alive, -torch.inf)
    rank = along.argsort(dim=1, descending=True).argsort(dim=1)
    return alive & (rank >= (share * alive.sum(1)).long()[:, None])


def _draw(alive: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
    """(n, num_points) of the points that are alive (n, P), without replacement while there are enough."""
    key = torch.rand(alive.shape, generator=generator).masked_fill(~alive, -1.0)
    order = key.argsort(dim=1, descending=True)
    position = torch.arange(num_points) % alive.sum(1, keepdim=True)
    return order.gather(1, position)
