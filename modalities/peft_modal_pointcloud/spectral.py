"""Graph Fourier bases of token centres: Morton order, graph Laplacians, eigenvectors (PointGST, arXiv:2410.08114)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BasisKind = Literal["exact", "reference"]
Transform = Literal["reference", "paper"]

GRID = 100
"""Cells of the Morton curve per unit length."""
_BITS = 16
_SMALLEST = 1e-12


@torch.no_grad()
def morton_key(centres: Tensor) -> Tensor:
    """Position of every centre on the Morton curve; bits are interleaved as y, x, z from the most significant.

    Coordinates are truncated toward zero on a grid of 0.01 and keep their low 16 bits, so negative ones come last.

    Args:
        centres: (..., 3).

    Returns:
        Keys (...), int64.
    """
    cells = (GRID * centres.detach().float()).to(torch.int64) & (2**_BITS - 1)
    x, y, z = cells.unbind(-1)
    key = torch.zeros_like(x)
    for bit in range(_BITS):
        for place, axis in enumerate((z, x, y)):
            key |= (axis >> bit & 1) << (3 * bit + place)
    return key


@torch.no_grad()
def morton_order(centres: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation (..., G) that sorts centres (..., G, 3) along the Morton curve, and its inverse; ties stay."""
    order = morton_key(centres).argsort(dim=-1, stable=True)
    return order, order.argsort(dim=-1)


@torch.no_grad()
def adjacency(centres: Tensor, *, basis: BasisKind = "exact") -> tuple[Tensor, Tensor]:
    """Weights A_ij = 1 / (d_ij / m + [i = j]) of the full graph, and m, the smallest positive distance.

    `exact` takes distances from differences and m per graph. `reference` is the released code: above 25 nodes distances
    come from a matrix product, whose rounding makes some d_ii positive, and m is the minimum over the whole batch.

    Args:
        centres: (graphs, n, 3).
        basis: Which.

    Returns:
        A (graphs, n, n), and m (graphs, 1, 1) or (1, 1, 1).
    """
    points = centres.detach().float()
    eye = torch.eye(points.shape[1], device=points.device)
    if basis == "exact":
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") * (1 - eye)
    else:
        distance = torch.cdist(points, points)
    positive = torch.where(distance > 0, distance, torch.inf)
    smallest = positive.amin((1, 2), keepdim=True) if basis == "exact" else positive.amin().view(1, 1, 1)
    # A graph whose nodes all coincide has no positive distance.
    smallest = torch.where(smallest.isinf(), 1.0, smallest)
    # Two centres in one place would have an infinite weight.
    return (distance / smallest + eye).clamp_min(_SMALLEST).reciprocal(), smallest


def laplacian(weights: Tensor) -> Tensor:
    """I - D^-1/2 A D^-1/2 of A (graphs, n, n) with its self-loops, D + 1e-6 under the root."""
    scale = (weights.sum(2) + 1e-6).rsqrt()
    return torch.eye(weights.shape[1], device=weights.device) - scale[:, :, None] * weights * scale[:, None]


@torch.no_grad()
def spectral_basis(centres: Tensor, *, basis: BasisKind = "exact") -> Tensor:
    """Eigenvectors of the graph over the centres, one a column, smoothest first; the first columns are for drawing.

    Args:
        centres: (graphs, n, 3).
        basis: See `adjacency`; `exact` also makes the largest entry of each column positive, `reference` leaves signs.

    Returns:
        (graphs, n, n) in float32, under autocast too.
    """
    with torch.autocast(centres.device.type, enabled=False):
        vectors = torch.linalg.eigh(laplacian(adjacency(centres, basis=basis)[0])).eigenvectors
        if basis == "exact":
            largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
            vectors = torch.where(largest < 0, -vectors, vectors)
    return vectors


def local_chunks(centres: Tensor, order: Tensor, local: int) -> Tensor:
    """Centres (B, G, 3) in Morton order, cut into sub-graphs (B * G / local, local, 3)."""
    return centres.gather(1, order[..., None].expand_as(centres)).reshape(-1, local, 3)


@torch.no_grad()
def stacked_transform(basis_global: Tensor, basis_local: Tensor, order: Tensor, *, transform: Transform) -> Tensor:
    """Q that maps tokens to global coefficients (first G rows) and to local ones (last G); Q^T maps both back and adds.

    P being the Morton order, Q = [U_g; U_l P] for `reference` and [U_g^T; U_l^T P] for `paper`, U_l block-diagonal:
    one product per direction instead of two, and no sorting of tokens in the layers.

    Args:
        basis_global: U_g (B, G, G).
        basis_local: U_l (B, G / s, s, s), in Morton order.
        order: Morton permutation (B, G).
        transform: Direction.

    Returns:
        (B, 2G, G).
    """
    batch, count, _ = basis_global.shape
    if transform == "paper":
        basis_global, basis_local = basis_global.transpose(1, 2), basis_local.transpose(2, 3)
    size = basis_local.shape[-1]
    members = order.view(batch, -1, 1, size).expand_as(basis_local).reshape(batch, count, size)
    scattered = torch.zeros_like(basis_global).scatter(2, members, basis_local.reshape(batch, count, size))
    return torch.cat([basis_global, scattered], dim=1)


def spectral_transform(centres: Tensor, *, local: int, basis: BasisKind, transform: Transform) -> Tensor:
    """Q (B, 2G, G) of centres (B, G, 3); see `stacked_transform`. `local` divides G."""
    batch, count, _ = centres.shape
    order, _ = morton_order(centres)
    basis_global = spectral_basis(centres, basis=basis)
    basis_local = spectral_basis(local_chunks(centres, order, local), basis=basis)
    return stacked_transform(
        basis_global, basis_local.view(batch, count // local, local, local), order, transform=transform
    )
