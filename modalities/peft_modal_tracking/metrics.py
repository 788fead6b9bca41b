"""Metrics of single-object tracking as each toolkit computes them; they differ, and their numbers do not compare.

Boxes are x, y, w, h per frame, (T, 4), the first frame's included; computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from peft_modal.errors import DataError
from peft_modal_tracking.boxes import Size, clipped, overlaps, to_corners, to_sizes

Rules = Literal["plain", "lasot"]
_DOUBLE: Final = torch.float64
SUCCESS: Final = torch.linspace(0, 1, 21, dtype=_DOUBLE)
PRECISION: Final = torch.arange(0, 51, dtype=_DOUBLE)
NORMALISED: Final = torch.arange(0, 51, dtype=_DOUBLE) / 100
GOT10K: Final = torch.linspace(0, 1, 101, dtype=_DOUBLE)
_AT: Final = 20
"""Index of 20 pixels, and of a normalised distance of 0.2."""


@dataclass(frozen=True)
class Scores:
    """Curves of one sequence, or their mean over several."""

    success: Tensor
    """Share of frames whose IoU is above 0, .05, ..., 1 (21,)."""
    precision: Tensor
    """Share of frames whose centre is within 0, 1, ..., 50 pixels (51,)."""
    normalised: Tensor
    """Share of frames whose centre is within 0, .01, ..., .5 of the target's sides (51,)."""

    @property
    def figures(self) -> dict[str, float]:
        """The numbers that papers print."""
        return {
            "success_auc": float(self.success.mean()),
            "precision": float(self.precision[_AT]),
            "normalised_precision": float(self.normalised[_AT]),
            "success_rate_50": float(self.success[10]),
            "success_rate_75": float(self.success[15]),
        }


@dataclass(frozen=True)
class Result:
    """What a tracker found in one sequence, and the truth."""

    predicted: Tensor
    """(T, 4) x, y, w, h."""
    target: Tensor
    """(T, 4)."""
    visible: Tensor
    """(T,) bool; False where the target is absent."""
    size: Size
    """Of the frames, height and width."""

    def __post_init__(self) -> None:
        if self.predicted.shape != self.target.shape:
            raise DataError(
                f"{len(self.predicted)} boxes were predicted for {len(self.target)} frames; every frame needs one"
            )
        if not bool(self.predicted.isfinite().all()):
            raise DataError("a predicted box is not a number: the tracker is broken, not merely wrong")


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The plain mean over sequences."""
    parts = (torch.stack([getattr(s, name) for s in scores]).mean(0) for name in ("success", "precision", "normalised"))
    return Scores(*parts)


def frame_ious(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of every frame, (T,) float64; 0 where both boxes are empty."""
    shared, union = overlaps(to_corners(predicted.to(_DOUBLE)), to_corners(target.to(_DOUBLE)))
    return shared / union.clamp(min=torch.finfo(_DOUBLE).tiny)


def one_pass(result: Result, rules: Rules = "plain") -> Scores:
    """One-pass evaluation as LoRAT, OSTrack, STARK and PyTracking do it.

    All frames of the sequence are the denominator. A frame whose target has no size counts as IoU -1, an infinite
    distance, and a normalised distance that is a hit. With LaSOT's rules (LaSOT, its extension, VastTrack) absent
    frames are misses everywhere.

    Args:
        result: Of the sequence.
        rules: Which.
    """
    iou, distance, normalised = _frames(result)
    has_size = (result.target[:, 2:] > 0).all(1)
    counts = has_size & result.visible if rules == "lasot" else has_size
    iou = torch.where(counts, iou, -1.0)
    distance = torch.where(counts, distance, torch.inf)
    normalised = torch.where(has_size, normalised, -1.0)
    if rules == "lasot":
        normalised = torch.where(result.visible, normalised, torch.inf)
    return _curves(iou, distance, normalised, len(iou))


def lasot_official(result: Result) -> Scores:
    """The official LaSOT toolkit: the truth in frame 0, absent frames left out of the counts but not of the length.

    Predictions without a size are replaced by those before them; frames whose truth holds a number that is not
    positive count as IoU -1 and as hits of both precisions.
    """
    predicted = result.predicted.to(_DOUBLE).clone()
    predicted[0] = result.target[0].to(_DOUBLE)
    for i in range(1, len(predicted)):
        if not bool((predicted[i, 2:] > 0).all()):
            predicted[i] = predicted[i - 1]
    iou, distance, normalised = _frames(Result(predicted, result.target, result.visible, result.size))
    is_positive = (result.target > 0).all(1)
    iou, distance, normalised = (
        torch.where(is_positive, values, -1.0)[result.visible] for values in (iou, distance, normalised)
    )
    return _curves(iou, distance, normalised, len(result.target))


def got10k(results: Sequence[Result]) -> tuple[dict[str, float], Tensor]:
    """GOT-10k's toolkit: frame 0 and absent frames dropped, boxes clipped to the image, frames of all sequences pooled.

    Returns:
        `ao`, `sr50`, `sr75`, and the success curve over 101 thresholds.
    """
    pooled = []
    for result in results:
        kept = result.visible.clone()
        kept[0] = False
        boxes = (clipped(to_corners(b[kept].to(_DOUBLE)), result.size) for b in (result.predicted, result.target))
        shared, union = overlaps(*boxes)
        pooled.append(shared / (union + torch.finfo(_DOUBLE).eps))
    ious = torch.cat(pooled)
    if not len(ious):
        return {"ao": 0.0, "sr50": 0.0, "sr75": 0.0}, torch.zeros_like(GOT10K)
    curve = (ious[:, None] > GOT10K).to(_DOUBLE).mean(0)
    figures = {"ao": float(ious.mean())}
    return figures | {f"sr{n}": float((ious > n / 100).to(_DOUBLE).mean()) for n in (50, 75)}, curve


def trackingnet(results: Sequence[Result]) -> dict[str, float]:
    """TrackingNet's devkit, in percent: boxes rounded to whole pixels, every figure the area under its curve.

    Its precision is an area, too, and is not the precision at 20 pixels of the others. Success counts IoU >= t.
    `coverage` is the share of sequences with a result.
    """
    thresholds = (SUCCESS, torch.linspace(0, 50, 21, dtype=_DOUBLE), torch.linspace(0, 0.5, 21, dtype=_DOUBLE))
    names = ("success", "precision", "normalised_precision")
    found: dict[str, list[float]] = {name: [] for name in names}
    for result in results:
        predicted, target = (b.to(_DOUBLE).round() for b in (result.predicted, result.target))
        predicted[0] = target[0]
        iou, distance, normalised = _frames(Result(predicted, target, result.visible, result.size))
        reached = (
            iou[:, None] >= thresholds[0], distance[:, None] <= thresholds[1], normalised[:, None] <= thresholds[2],
        )  # fmt: skip
        for name, hits, over in zip(names, reached, thresholds, strict=True):
            area = torch.trapezoid(hits.to(_DOUBLE).mean(0), over) / over[-1]
            found[name].append(100 * float(area))
    has_boxes = [bool((result.predicted != 0).any()) for result in results]  # a missing file reads as zeros
    coverage = 100 * sum(has_boxes) / len(results)
    return {"coverage": coverage} | {name: sum(values) / len(values) for name, values in found.items()}


def _frames(result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, distance of centres in pixels, and in shares of the target's sides, of every frame."""
    predicted, target = (to_corners(b.to(_DOUBLE)) for b in (result.predicted, result.target))
    apart = ((predicted[:, :2] + predicted[:, 2:]) - (target[:, :2] + target[:, 2:])) / 2
    relative = apart / to_sizes(target)[:, 2:].clamp(min=torch.finfo(torch.float32).eps)
    return frame_ious(result.predicted, result.target), apart.norm(dim=1), relative.norm(dim=1)


def _curves(iou: Tensor, distance: Tensor, normalised: Tensor, length: int) -> Scores:
    return Scores(
        (iou[:, None] > SUCCESS).to(_DOUBLE).sum(0) / length,
        (distance[:, None] <= PRECISION).to(_DOUBLE).sum(0) / length,
        (normalised[:, None] <= NORMALISED).to(_DOUBLE).sum(0) / length,
    )
