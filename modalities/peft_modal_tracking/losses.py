"""LoRAT's labels and losses (Lin et al., ECCV 2024, arXiv:2403.05231, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional

from peft_modal_heads.tracking_mlp import TrackingOutput
from peft_modal_tracking.boxes import Size, areas, cells_of, overlaps

IOU_EPSILON = 1e-6
GIOU_EPSILON = 1e-7


def positive_cells(targets: Tensor, size: Size, grid: Size) -> Tensor:
    """The cells that a target touches, at least one of each sample, (B, rows, columns) int64.

    Args:
        targets: Boxes in pixels of the search picture, (B, 4).
        size: Of the search picture.
        grid: Rows and columns.
    """
    return cells_of(targets, size, grid)


def tracking_losses(output: TrackingOutput, targets: Tensor, size: Size) -> dict[str, Tensor]:
    """Losses of scores and boxes, both divided by the number of positive cells of the batch.

    The score of a positive cell learns its own box's IoU, that of every other cell 0 (binary cross-entropy over all
    cells); the box of a positive cell learns the target (1 - GIoU). Only pairs that show the target are sampled, so
    there is a positive cell. Of a target that reaches over the border, cells inside are positive, and they learn the
    whole box.

    Args:
        output: Of the head.
        targets: Boxes in pixels of the search picture, (B, 4).
        size: Of the search picture.
    """
    scores, boxes = output
    is_positive = positive_cells(targets, size, (scores.shape[-2], scores.shape[-1])).bool()
    scale = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
    wanted = (targets.to(boxes.dtype) / scale)[:, None, None].expand_as(boxes)[is_positive]  # (P, 4)
    found = boxes[is_positive]
    count = _positives(is_positive)
    labels = torch.zeros_like(scores).masked_scatter(is_positive, iou(found.detach(), wanted))
    cls = functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / count
    box = (1 - generalised_iou(found, wanted)).sum() / count
    return {"loss_cls": cls, "loss_box": box}


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union (...) of pairs of boxes (..., 4)."""
    shared, union = overlaps(one, other)
    return shared / union.clamp(min=IOU_EPSILON)


def generalised_iou(one: Tensor, other: Tensor) -> Tensor:
    """IoU less the share of the enclosing box that neither covers (Rezatofighi et al., CVPR 2019, arXiv:1902.09630)."""
    shared, union = overlaps(one, other)
    corners = torch.cat([torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])], -1)
    hull = areas(corners)
    return shared / union.clamp(min=GIOU_EPSILON) - (hull - union) / hull.clamp(min=GIOU_EPSILON)


def _positives(is_positive: Tensor) -> Tensor:
    """Positive cells, averaged over the processes that share a batch; 1 at least."""
    count = is_positive.sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count /= distributed.get_world_size()
    return count.clamp(min=1)
