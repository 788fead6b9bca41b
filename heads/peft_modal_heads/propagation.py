"""Feature propagation of PointNet++ (Qi et al., NeurIPS 2017, arXiv:1706.02413)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

NEIGHBOURS = 3
_EPSILON = 1e-8


class FeaturePropagation(nn.Module):
    """Brings features of centres to other places, and mixes them with the places' coordinates.

    The features of the three nearest centres are averaged with the weights 1 / (d^2 + 1e-8), d^2 the squared distance;
    [x, y, z, interpolated] then passes shared layers (convolution of size 1 with bias, BatchNorm, ReLU). Averaging is
    linear, so it comes behind the first product, which then runs over the few centres and not over all places.

    Args:
        in_dim: Channels C of the features.
        dims: Channels behind each layer.
    """

    def __init__(self, in_dim: int, dims: Sequence[int]) -> None:
        super().__init__()
        widths = [3 + in_dim, *dims]
        self.mlp_convs = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip(widths, dims, strict=False))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(b) for b in dims)

    def forward(self, places: Tensor, centres: Tensor, features: Tensor) -> Tensor:
        """Channels (B, Q, dims[-1]) at `places` (B, Q, 3), from `features` (B, G, C) at `centres` (B, G, 3)."""
        matrix = interpolation(places, centres).to(features.dtype)
        first, *others = self.mlp_convs
        own, brought = first.weight[:, :3, 0], first.weight[:, 3:, 0]  # type: ignore[index]
        x = functional.linear(places.to(features.dtype), own, first.bias)  # type: ignore[arg-type]
        x = torch.relu(over_places(self.mlp_bns[0], x + matrix @ functional.linear(features, brought)))
        for conv, norm in zip(others, self.mlp_bns[1:], strict=True):
            x = torch.relu(over_places(norm, pointwise(conv, x)))  # type: ignore[arg-type]
        return x


def interpolation(places: Tensor, centres: Tensor) -> Tensor:
    """The weight (B, Q, G) of every centre (B, G, 3) at every place (B, Q, 3): three are not zero, their sum is 1.

    Distances come from differences in float32, not from |a|^2 + |b|^2 - 2ab as in released code, whose small distances
    are rounding noise and may be negative.
    """
    with torch.autocast(places.device.type, enabled=False):
        places, centres = places.float(), centres.float()
        with torch.no_grad():
            distances = torch.cdist(places, centres, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.topk(min(NEIGHBOURS, centres.shape[1]), dim=2, largest=False).indices  # (B, Q, 3)
        near = centres.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 3)).view(*nearest.shape, 3)
        weights = 1 / ((near - places[:, :, None]).square().sum(3) + _EPSILON)
        weights = weights / weights.sum(2, keepdim=True)
        return weights.new_zeros(*nearest.shape[:2], centres.shape[1]).scatter(2, nearest, weights)


def pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of size 1 over places (B, Q, C) as one product: the same numbers, several times faster on a CPU."""
    return functional.linear(x, conv.weight[:, :, 0], conv.bias)


def over_places(norm: nn.Module, x: Tensor) -> Tensor:
    """A BatchNorm whose samples are the places (B, Q, C) of all clouds."""
    normed: Tensor = norm(x.flatten(0, 1))
    return normed.view_as(x)
