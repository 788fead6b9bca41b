"""Where the geometry-aware adapter pools, and how what it pools spreads back to the tokens.

Everything is computed in float32 outside of autocast, and once for all blocks that share it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Context
from peft_modal_pointcloud.sampling import farthest_point_sample, gather_points, knn

Indexing = Literal["aligned", "reference"]
EPSILON: Final = 1e-8
INIT_STD: Final = 0.02


@dataclass(frozen=True)
class Neighbourhoods:
    """Sub-centres among the nodes of each cloud, and the nodes around them."""

    centres: Tensor
    """Indices (B, S)."""
    members: Tensor
    """Indices (B, S, k), nearest first; a sub-centre is its own first."""


@dataclass(frozen=True)
class Geometry:
    """What one block needs of it; rows are the block's tokens without the class token, of all clouds in turn."""

    centres: Tensor
    """Rows (B * S,) of the sub-centres."""
    members: Tensor
    """Rows (B * S, k) of their neighbours."""
    weights: Tensor
    """(B, G, S): shares of the sub-centres in each token, float32."""


@torch.no_grad()
def neighbourhoods(nodes: Tensor, *, num_sub_centres: int, k: int) -> Neighbourhoods:
    """Farthest nodes and the nodes nearest to each.

    Args:
        nodes: Coordinates (B, n, 3).
        num_sub_centres: S, at most n.
        k: Neighbours, at most n.
    """
    centres = farthest_point_sample(nodes, num_sub_centres)
    return Neighbourhoods(centres, knn(nodes, gather_points(nodes, centres), k))


def inverse_distance_weights(points: Tensor, centres: Tensor) -> Tensor:
    """W_ij = (1 / (|a_i - b_j|^2 + 1e-8)) / (its sum over all j).

    The released code expands the square, which may round to just below zero where a point lies on a centre; direct
    differences give the same shares and no such values.

    Args:
        points: a (B, G, 3).
        centres: b (B, S, 3).

    Returns:
        (B, G, S), float32; rows sum to 1. Gradients flow to both.
    """
    with torch.autocast(points.device.type, enabled=False):
        squared = (points.float()[:, :, None] - centres.float()[:, None]).square().sum(-1)
        nearness = 1.0 / (squared + EPSILON)
        return nearness / nearness.sum(2, keepdim=True)


def flat_rows(indices: Tensor, stride: int) -> Tensor:
    """Indices (B, ...) within clouds as rows of all clouds in turn, `stride` rows each."""
    offset = torch.arange(len(indices), device=indices.device) * stride
    return indices + offset.view(-1, *[1] * (indices.ndim - 1))


class Grouping(nn.Module):
    """Base: the geometry of the blocks that share it.

    Args:
        num_sub_centres: S.
        k: Neighbours of each.
    """

    num_prompts: int = 0
    """Rows of prompts in front of the tokens'."""

    def __init__(self, *, num_sub_centres: int, k: int) -> None:
        super().__init__()
        self.num_sub_centres = num_sub_centres
        self.k = k

    @abstractmethod
    def forward(self, context: Context) -> Geometry:
        """The geometry of the running pass."""

    def _once(self, context: Context, what: str, compute: Callable[[], Neighbourhoods]) -> Neighbourhoods:
        return context.once(f"point_peft.{what}.{id(self)}", compute)

    def _around(self, nodes: Tensor) -> Neighbourhoods:
        return neighbourhoods(nodes, num_sub_centres=self.num_sub_centres, k=self.k)


class TokenGrouping(Grouping):
    """Of blocks without prompts: the nodes are the tokens' own centres."""

    def forward(self, context: Context) -> Geometry:
        """Without gradients, all of it once per pass."""

        def compute() -> Geometry:
            centres = context.get("centres")
            found = self._around(centres)
            num_tokens = centres.shape[1]
            return Geometry(
                flat_rows(found.centres, num_tokens).flatten(),
                flat_rows(found.members, num_tokens).flatten(0, 1),
                inverse_distance_weights(centres, gather_points(centres, found.centres)),
            )

        return context.once(f"point_peft.geometry.{id(self)}", compute)


class PromptGrouping(Grouping):
    """Of blocks with prompts, which have learnt coordinates Q (P, 3) that all clouds share.

    They are trained through the distances alone.

    Args:
        num_prompts: P.
        num_sub_centres: S.
        k: Neighbours of each.
    """

    def __init__(self, *, num_prompts: int, num_sub_centres: int, k: int) -> None:
        super().__init__(num_sub_centres=num_sub_centres, k=k)
        self.num_prompts = num_prompts
        self.prompt_coords = nn.Parameter(torch.empty(num_prompts, 3))
        nn.init.trunc_normal_(self.prompt_coords, std=INIT_STD)

    def beside(self, points: Tensor) -> Tensor:
        """(B, P + N, 3): the prompts' coordinates in front of points (B, N, 3)."""
        return torch.cat([self.prompt_coords.float().expand(len(points), -1, -1), points.float()], dim=1)


class AlignedGrouping(PromptGrouping):
    """Nodes are the prompts and the tokens' centres, node by node the rows of the block."""

    def forward(self, context: Context) -> Geometry:
        """Indices once per pass; tokens keep their own coordinates."""
        centres = context.get("centres")
        nodes = self.beside(centres)
        found = self._once(context, "aligned", lambda: self._around(nodes))
        stride = nodes.shape[1]
        return Geometry(
            flat_rows(found.centres, stride).flatten(),
            flat_rows(found.members, stride).flatten(0, 1),
            inverse_distance_weights(centres, gather_points(nodes, found.centres)),
        )


class ReferenceGrouping(PromptGrouping):
    """As released: centres are sampled again among prompts and points, and their indices read other rows.

    The G indices per cloud run in steps of G, the rows in steps of P + G: index j means prompt j for j < P and token
    j - P otherwise, though centre j is neither, and clouds after the first read rows of their neighbours.
    """

    def forward(self, context: Context) -> Geometry:
        """Indices once per pass; token i has the coordinates of prompted centre i."""
        num_tokens = context.get("centres").shape[1]
        centres = self.prompted_centres(context, num_tokens)
        found = self._once(context, "reference", lambda: self._around(centres))
        return Geometry(
            flat_rows(found.centres, num_tokens).flatten(),
            flat_rows(found.members, num_tokens).flatten(0, 1),
            inverse_distance_weights(centres, gather_points(centres, found.centres)),
        )

    def prompted_centres(self, context: Context, num_tokens: int) -> Tensor:
        """(B, G, 3): farthest points among the prompts' coordinates and the cloud."""
        nodes = self.beside(context.batch["points"])
        indices = context.once(
            f"point_peft.prompted.{id(self)}", lambda: farthest_point_sample(nodes.detach(), num_tokens)
        )
        return gather_points(nodes, indices)


GROUPINGS: Final[dict[str, type[PromptGrouping]]] = {"aligned": AlignedGrouping, "reference": ReferenceGrouping}
