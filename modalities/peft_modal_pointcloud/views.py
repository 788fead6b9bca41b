"""What a network and its adapter see of a cloud, as samples that the renderer draws."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from peft_modal_pointcloud.render import FIRST_PART, LEGEND, MARKS, SHOWN, STRONG, VALUES
from peft_modal_pointcloud.sampling import farthest_point_sample, knn
from peft_modal_pointcloud.spectral import adjacency, laplacian, local_chunks, morton_order, spectral_basis

_PATCHES: Final = 5
"""Neighbourhoods that are drawn: more would cover each other."""
_COMPONENTS: Final = range(1, 4)
"""The first one is the root of the degrees, which tells nothing but density."""
_NEAREST: Final = 3
"""Centres that a point's value is made of, as in the propagation of features."""


def patch_views(points: Tensor, centres: Tensor, neighbourhood: Tensor) -> dict[str, dict[str, Any]]:
    """The centres of all patches, and a few patches far from each other.

    Args:
        points: (P, 3).
        centres: (G, 3).
        neighbourhood: Points of each patch, relative to its centre (G, S, 3).
    """
    groups, size, _ = neighbourhood.shape
    chosen = farthest_point_sample(centres[None], min(_PATCHES, groups))[0]
    members = (neighbourhood[chosen] + centres[chosen, None]).flatten(0, 1)
    patch = torch.arange(len(chosen)).repeat_interleave(size)
    return {
        f"{groups} centres": {"points": points, MARKS: centres},
        f"{len(chosen)} of the {groups} neighbourhoods of {size} points": {
            "points": torch.cat([points, members]),
            SHOWN: torch.cat([torch.full((len(points),), -1), patch]),
            STRONG: torch.cat([torch.zeros(len(points), dtype=torch.bool), torch.ones(len(members), dtype=torch.bool)]),
            FIRST_PART: 0, LEGEND: [""] * len(chosen), MARKS: centres[chosen],
        },
    }  # fmt: skip


def spectral_views(points: Tensor, centres: Tensor, *, local: int) -> dict[str, dict[str, Any]]:
    """The smoothest components of the graph over the centres (G, 3), and the sub-graphs of `local` centres each."""
    basis = spectral_basis(centres[None])[0]
    graph = laplacian(adjacency(centres[None])[0])[0]
    frequencies = torch.einsum("gk,gh,hk->k", basis, graph, basis)
    nearest, weight = _nearest(points, centres)
    views: dict[str, dict[str, Any]] = {}
    for k in _COMPONENTS[: len(centres) - 1]:
        component = basis[:, k] / basis[:, k].abs().max()
        values = (component[nearest] * weight).sum(-1)
        views[f"component {k + 1}, frequency {float(frequencies[k]):.2f}"] = {"points": points, VALUES: values}
    order = morton_order(centres[None])[0][0]
    part = torch.empty_like(order)
    count = len(local_chunks(centres[None], order[None], local))
    part[order] = torch.arange(count).repeat_interleave(local)
    views[f"{count} sub-graphs of {local} centres"] = {
        "points": points, SHOWN: part[nearest[:, 0]], FIRST_PART: 0, LEGEND: [""] * count,
    }  # fmt: skip
    return views


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centres of every point (P, k), and their weights by inverse distance."""
    index = knn(centres[None], points[None], min(_NEAREST, len(centres)))[0]
    distance = (centres[index] - points[:, None]).norm(dim=-1)
    weight = 1 / (distance + 1e-8)
    return index, weight / weight.sum(-1, keepdim=True)
