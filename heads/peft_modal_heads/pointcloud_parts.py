"""The part segmentation head of Point-MAE fine-tuning."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import DropRate, PositiveInt
from peft_modal_heads.dense import level
from peft_modal_heads.parts import PartOutput, PartTable
from peft_modal_heads.pooling import require_two
from peft_modal_heads.propagation import FeaturePropagation, over_places, pointwise

_NEGATIVE_SLOPE = 0.2
_POOLED = ("max", "mean")


class PointCloudParts(nn.Module):
    """A part for every point, from tokens of several depths (Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604).

    The levels' tokens, concatenated over channels, are brought to the points by `FeaturePropagation`. Beside them
    stand features of the whole shape, the same for all points: what `pool` names and the embedded category. Two
    layers with BatchNorm, ReLU and dropout follow, and a classifier over the parts of all categories together. The
    shape's share of the first product is computed once per cloud, not once per point.

    Parameters carry the authors' names. A batch needs two clouds while training.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of parts; supplied by the program.
        class_names: Their names `category/part`; supplied by the program.
        pool: Shape features: `max` and `mean` of the patches over all levels, or what a method exports. None for what
            it exports, if anything, as IDPT's segmentation does, else for both.
        propagation_dims: Channels of the propagation's two layers; None for 4 times the width and 1024, as published.
        hidden_dims: Channels of the two layers behind.
        category_dim: Channels of the embedded category.
        dropout: Probability of zeroing a channel behind the first of these layers.

    Raises:
        ConfigError: The backbone gives no levels of points, or `pool` names something else.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs", "class_names"})

    def __init__(
        self,
        spec: FeatureSpec,
        num_outputs: int,
        class_names: tuple[str, ...],
        *,
        pool: list[str] | None = None,
        propagation_dims: tuple[PositiveInt, PositiveInt] | None = None,
        hidden_dims: tuple[PositiveInt, PositiveInt] = (512, 256),
        category_dim: PositiveInt = 64,
        dropout: DropRate = 0.5,
    ) -> None:
        super().__init__()
        self.num_levels = _levels_of_points(spec)
        self.pool = _pool_of(spec, pool)
        self.num_categories = PartTable(class_names).num_categories
        dims = (4 * spec.width, 1024) if propagation_dims is None else propagation_dims
        width = self.num_levels * spec.width
        shape_dim = sum(width if name in _POOLED else spec.available()[name] for name in self.pool) + category_dim
        self.label_conv = nn.Sequential(
            nn.Conv1d(self.num_categories, category_dim, 1, bias=False),
            nn.BatchNorm1d(category_dim),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
        )
        self.propagation_0 = FeaturePropagation(width, dims)
        self.convs1 = nn.Conv1d(dims[-1] + shape_dim, hidden_dims[0], 1)
        self.bns1 = nn.BatchNorm1d(hidden_dims[0])
        self.dropout = nn.Dropout(dropout)
        self.convs2 = nn.Conv1d(hidden_dims[0], hidden_dims[1], 1)
        self.bns2 = nn.BatchNorm1d(hidden_dims[1])
        self.convs3 = nn.Conv1d(hidden_dims[1], num_outputs, 1)

    def forward(self, features: Features) -> PartOutput:
        """Log-probabilities at the queries of each cloud, by default its points.

        Raises:
            DataError: The batch has no categories.
        """
        category = features.extras.get("category")
        if category is None:
            raise DataError("part segmentation needs the category of every cloud, and this batch has none")
        tokens = torch.cat([level(features, i) for i in range(self.num_levels)], dim=2)  # (B, G, levels * D)
        # Not `one_hot`, which reads values; a category that does not exist is an IndexError.
        one_hot = torch.eye(self.num_categories).to(tokens).index_select(0, category)[:, :, None]
        if self.training:
            require_two(one_hot)
        shape = [self._pooled(features, tokens, name) for name in self.pool]
        shape.append(self.label_conv(one_hot)[:, :, 0])
        local = self.propagation_0(features.extras["queries"], features.extras["centres"], tokens)  # (B, Q, C)
        x = torch.relu(over_places(self.bns1, self._first(local, torch.cat(shape, dim=1))))
        x = torch.relu(over_places(self.bns2, pointwise(self.convs2, self.dropout(x))))
        return PartOutput(pointwise(self.convs3, x).log_softmax(2), category)

    def _first(self, local: Tensor, shape: Tensor) -> Tensor:
        """`convs1` of [local (B, Q, C), shape (B, S) at every place]."""
        weight, width = self.convs1.weight[:, :, 0], local.shape[2]
        once = functional.linear(shape, weight[:, width:], self.convs1.bias)
        return functional.linear(local, weight[:, :width]) + once[:, None]

    def _pooled(self, features: Features, tokens: Tensor, name: str) -> Tensor:
        if name not in _POOLED:
            return features.extras[name].flatten(1)
        return tokens.amax(1) if name == "max" else tokens.mean(1)


def _levels_of_points(spec: FeatureSpec) -> int:
    if spec.layout is None or spec.layout.body != "points":
        raise ConfigError("head 'pointcloud_parts' reads tokens of points, and this backbone gives none")
    if not spec.levels:
        raise ConfigError(
            "head 'pointcloud_parts' reads tokens behind several blocks, and the backbone keeps none; set "
            "backbone.levels=3"
        )
    return len(spec.levels)


def _pool_of(spec: FeatureSpec, pool: list[str] | None) -> tuple[str, ...]:
    chosen = pool if pool is not None else list(spec.exports) or list(_POOLED)
    known = [*_POOLED, *spec.exports]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"head.pool: there is no shape feature '{name}' here; known: {', '.join(known)}")
    return tuple(chosen)
