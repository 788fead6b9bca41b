"""What tracking adds to a report: the curves of one-pass evaluation, figures of sequences, frames with both boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from peft_modal.report import (
    Best,
    Column,
    Fact,
    Gallery,
    Kept,
    Row,
    Section,
    Table,
    Tile,
    draw,
    line_chart,
)
from peft_modal_tracking.metrics import (
    NORMALISED,
    PRECISION,
    SUCCESS,
    Result,
    Scores,
    frame_ious,
    mean_scores,
    one_pass,
)
from peft_modal_tracking.render import FOUND, FRAME, TRUE
from peft_modal_tracking.sequences import Video
from peft_modal_tracking.tracker import Track

_SAMPLES: Final = 3
_SHOWN: Final = 4
"""Frames of each sequence that is shown."""
_FOLDED_FROM: Final = 16
"""Rows of the table of sequences from which on it is folded."""


class TrackingCollector:
    """Keeps the curves of every sequence, and frames of a few.

    Args:
        seed: Of the draw among sequences.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self._rows: list[tuple[str, int, Scores]] = []
        self._worst = Best(_SAMPLES)
        self._drawn = Best(_SAMPLES)

    def add(self, batch: Mapping[str, Any], output: list[Track]) -> None:
        """Take in videos and what was found in them."""
        videos: list[Video] = batch["video"]
        for video, track in zip(videos, output, strict=True):
            index = len(self._rows)
            result = Result(track.boxes, video.boxes, video.visible, video.frames.size(0))
            scores = one_pass(result, video.rules)
            self._rows.append((video.name, len(video), scores))
            auc = scores.figures["success_auc"]
            for best, value in ((self._worst, -auc), (self._drawn, draw(self.seed, index))):
                if best.wants(value, index):
                    best.add(Kept(index, _sample(video, result, auc), None, value), index)

    def sections(self) -> tuple[Section, ...]:
        """Curves, then frames."""
        if not self._rows:
            return ()
        mean = mean_scores([scores for _, _, scores in self._rows])
        figures = mean.figures
        charts = Row(
            (
                _chart("Success", SUCCESS, mean.success, "IoU above", figures["success_auc"]),
                _chart("Precision", PRECISION, mean.precision, "pixels within", figures["precision"]),
                _chart(
                    "Normalised precision", NORMALISED, mean.normalised, "target sides within",
                    figures["normalised_precision"],
                ),
            )
        )  # fmt: skip
        lead = (
            f"Shares of frames, means over {len(self._rows):,} sequences; every frame counts. The success "
            "score is the area, the precisions are read at 20 pixels and at 0.2 of the target's sides."
        )
        galleries = tuple(
            Gallery(tuple(tile for kept in best.samples() for tile in _tiles(kept)), title)
            for best, title in ((self._worst, "Smallest success"), (self._drawn, "A seeded draw"))
        )
        shown = (
            "Frames of a few sequences, evenly spread: the true box in yellow, the one that was found in blue, dashed."
        )
        return (
            Section("tracking", "One-pass evaluation", (charts, self._table()), lead),
            Section("samples", "Samples", galleries, shown),
        )

    def _table(self) -> Table:
        rows = []
        for name, frames, scores in self._rows:
            figures = scores.figures
            rows.append((name, frames, figures["precision"], figures["success_auc"]))
        rows.sort(key=lambda row: row[3])
        columns = (
            Column("Sequence"), Column("Frames", "count"), Column("Precision at 20 pixels", "share"),
            Column("Success", "bar"),
        )  # fmt: skip
        return Table(columns, tuple(rows), "Figures of each sequence", folded=len(rows) >= _FOLDED_FROM)


def _chart(title: str, thresholds: Tensor, curve: Tensor, across: str, figure: float) -> Any:  # noqa: ANN401 — a block
    points = list(zip(thresholds.tolist(), curve.tolist(), strict=True))
    return line_chart(title, {f"{100 * figure:.1f} %; at the end": points}, x_label=across, kind="share")


def _sample(video: Video, result: Result, auc: float) -> dict[str, Any]:
    """A few frames, copied: whole videos would fill the memory."""
    ious = frame_ious(result.predicted, result.target)
    last = len(video) - 1
    chosen = sorted({round(last * i / (_SHOWN - 1)) for i in range(_SHOWN)})
    shots = [
        {FRAME: video.frames[i], TRUE: result.target[i], FOUND: result.predicted[i], "iou": float(ious[i]), "at": i}
        for i in chosen
    ]
    return {"name": video.name, "success": auc, "shots": shots}


def _tiles(kept: Kept) -> tuple[Tile, ...]:
    sample = kept.sample
    title = f"{sample['name']}, success {100 * sample['success']:.1f} %"
    return tuple(
        Tile(title, shot, None, (Fact("frame", shot["at"], "count"), Fact("IoU", shot["iou"], "share")))
        for shot in sample["shots"]
    )
