"""Figures of part segmentation as PointNet++ and its successors compute them on ShapeNetPart."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from peft_modal_heads.parts import PartTable


def shape_ious(found: Tensor, parts: Tensor, category: Tensor, table: PartTable) -> Tensor:
    """Mean over the parts of its category of each shape's intersection over union, (B,) float32.

    A part that is neither there nor found counts 1.

    Args:
        found: Predicted parts (B, N), of the shape's own category only.
        parts: True parts (B, N).
        category: Of each shape, (B,).
        table: The parts of each category.
    """
    labels = torch.arange(len(table.class_names), device=parts.device)
    is_found, is_true = found[..., None] == labels, parts[..., None] == labels  # (B, N, K)
    union = (is_found | is_true).sum(1)
    iou = torch.where(union > 0, (is_found & is_true).sum(1) / union.clamp(min=1), 1.0)  # (B, K)
    is_own = table.category_of.to(category.device) == category[:, None]
    return (iou * is_own).sum(1) / is_own.sum(1)


class GroupMean(Metric):
    """Mean of a value within each group, and over the groups that occurred.

    With one group it is a plain mean.

    Args:
        num_groups: How many there may be.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_groups: int = 1) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_groups), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, groups: Tensor | None = None) -> None:
        """Take in values (n,) and the group of each, (n,); None for the first."""
        groups = torch.zeros_like(values, dtype=torch.int64) if groups is None else groups
        self.total.index_add_(0, groups, values.to(self.total.dtype))
        self.count += torch.bincount(groups, minlength=len(self.count))

    def means(self) -> Tensor:
        """The mean of each group, NaN where nothing was seen."""
        return self.total / self.count

    def compute(self) -> Tensor:
        """The mean over groups; NaN where nothing was seen at all."""
        return self.means()[self.count > 0].mean()
