"""Following targets through videos, several at once (Lin et al., ECCV 2024, arXiv:2403.05231, section 3.5)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from peft_modal.api import Model, load
from peft_modal.attach.merge import merge_
from peft_modal.errors import ConfigError, DataError, MergeError
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.boxes import cells_of, to_corners, to_sizes
from peft_modal_tracking.selection import hann_window, select_box
from peft_modal_tracking.sequences import StoredFrames, Video
from peft_modal_tracking.steps import CropSettings, TrackState
from peft_modal_tracking.video_files import open_video

_LOG: Final = logging.getLogger(__name__)
PENALTY: Final = 0.45


@dataclass(frozen=True)
class Track:
    """Where a target was found."""

    boxes: Tensor
    """x, y, w, h from 0 of every frame, the given first one included, (T, 4) float32."""
    scores: Tensor
    """How sure the tracker was, (T,); 1 in the first frame."""
    seconds: Tensor
    """What each frame took, (T,) float64; of videos followed side by side, their share."""

    @property
    def frames_per_second(self) -> float:
        """Over all frames but the first."""
        spent = float(self.seconds[1:].sum())
        return (len(self.seconds) - 1) / spent if spent else 0.0


class Tracker:
    """A backbone and a head that follow targets.

    There is no update of the template and no search beyond the surroundings of the last box.

    Args:
        backbone: LoRAT's, whatever is attached to it.
        head: Gives `TrackingOutput`.
        settings: Of the crops; as in training.
        window_penalty: Weight of the window that prefers the middle of the search picture.
    """

    def __init__(
        self, backbone: LoRAT, head: nn.Module, settings: CropSettings, *, window_penalty: float = PENALTY
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.settings = settings
        self.window_penalty = window_penalty
        self.window = hann_window(backbone.grids["search"])

    @classmethod
    def load(cls, path: str | Path, *, merge: bool = True) -> Tracker:
        """A tracker from its adapter file.

        Args:
            path: The file.
            merge: Fold the adapter into the network's weights, after which it costs nothing; what cannot be folded
                stays beside it, and the log says so.

        Raises:
            ConfigError: It is no file of a tracker; else as `peft_modal.load`.
        """
        return cls.of(load(path), merge=merge)

    @classmethod
    def of(cls, model: Model, *, merge: bool = False) -> Tracker:
        """A tracker from a loaded model, which `merge` changes.

        Raises:
            ConfigError: It is no tracker's.
        """
        if not isinstance(model.backbone, LoRAT) or model.header is None:
            raise ConfigError(f"'{model.composed.nodes['backbone'].name}' is no tracker; give an adapter file of one")
        model.eval()
        if merge:
            try:
                merge_(model.backbone)
            except MergeError as error:
                _LOG.warning("the adapter stays beside the network: %s", error)
        penalty = float(model.composed.nodes["task"].kwargs.get("window_penalty", PENALTY))
        settings = CropSettings.from_dict(model.header.preprocessing)
        return cls(model.backbone, model.head, settings, window_penalty=penalty)

    def track(self, video: Video | Tensor | str | Path, box: Sequence[float] | Tensor | None = None) -> Track:
        """Follow one target.

        Args:
            video: A sequence, frames (T, 3, H, W) uint8, a video file, or a folder of frames.
            box: x, y, w, h of the target in the first frame; None for that of the sequence.

        Raises:
            DataError: There is no box, it has no area or lies outside, or a frame cannot be read.
        """
        (found,) = self.track_all([video], None if box is None else [box])
        return found

    @torch.no_grad()
    def track_all(
        self,
        videos: Sequence[Video | Tensor | str | Path],
        boxes: Sequence[Sequence[float] | Tensor] | None = None,
        *,
        at_once: int = 32,
        advance: Callable[[int], None] | None = None,
    ) -> list[Track]:
        """Follow the targets of several videos side by side; where one ends, the next begins.

        Args:
            videos: As of `track`.
            boxes: One for each; None for those of the sequences.
            at_once: The most side by side.
            advance: Called with the number of frames just done.

        Raises:
            DataError: See `track`.
        """
        if boxes is not None and len(boxes) != len(videos):
            raise DataError(f"there are {len(videos)} videos and {len(boxes)} boxes; each video needs one")
        waiting = iter(range(len(videos)))
        done: dict[int, Track] = {}
        running: list[_Run] = []
        with _evaluating(self.backbone, self.head):
            while True:
                # Only as many as are followed at once are open.
                running += [
                    _Run(index, videos[index], None if boxes is None else boxes[index], self.settings)
                    for index in islice(waiting, at_once - len(running))
                ]
                if not running:
                    return [done[index] for index in range(len(videos))]
                started = time.perf_counter()
                live = [run for run in running if run.read()]
                done |= {run.index: run.track() for run in running if not run.has_frame}
                running = live
                if live:
                    self._step(live)
                    for run in live:
                        run.seconds.append((time.perf_counter() - started) / len(live))
                if advance is not None:
                    advance(len(live))

    def _step(self, runs: Sequence[_Run]) -> None:
        device = self.backbone.device
        template = torch.stack([run.state.template for run in runs])
        marked = cells_of(
            torch.stack([run.state.template_box for run in runs]), self.settings.template_size,
            self.backbone.grids["template"],
        )  # fmt: skip
        search = torch.stack([run.search for run in runs])
        batch = {"template": template, "search": search, "template_mask": marked}
        output = self.head(self.backbone({name: value.to(device) for name, value in batch.items()}))
        boxes, scores = select_box(output, self.settings.search_size, self.window.to(device), self.window_penalty)
        for run, box, score in zip(runs, boxes.float().cpu(), scores.cpu().tolist(), strict=True):
            run.take(box, score)


class _Run:
    """One video on its way."""

    def __init__(
        self, index: int, video: Video | Tensor | str | Path, box: Sequence[float] | Tensor | None,
        settings: CropSettings,
    ) -> None:  # fmt: skip
        self.index = index
        started = time.perf_counter()
        given, self._frames = _opened(video)
        first = given if box is None else torch.as_tensor(box, dtype=torch.float32)
        if first is None or first.shape != (4,):
            raise DataError("a target needs a box x,y,width,height in the first frame, four numbers")
        frame = next(self._frames, None)
        if frame is None:
            raise DataError("the video has no frames")
        self.state = TrackState(frame, to_corners(first), settings)
        # As given, although a part of it may lie outside.
        self.boxes = [to_corners(first)]
        self.scores = [1.0]
        self.seconds = [time.perf_counter() - started]
        self.has_frame = True
        self.search: Tensor
        self._size = (0, 0)

    def read(self) -> bool:
        """Read the next frame and cut out the search picture; False where the video has ended."""
        frame = next(self._frames, None)
        if frame is None:
            self.has_frame = False
            return False
        self._size = (int(frame.shape[-2]), int(frame.shape[-1]))
        self.search = self.state.look(frame)
        return True

    def take(self, box: Tensor, score: float) -> None:
        """Take in what was found in that frame."""
        self.state.update(box, self._size)
        self.boxes.append(self.state.box)
        self.scores.append(score)

    def track(self) -> Track:
        """All of it."""
        return Track(
            to_sizes(torch.stack(self.boxes)),
            torch.tensor(self.scores),
            torch.tensor(self.seconds, dtype=torch.float64),
        )


def _opened(video: Video | Tensor | str | Path) -> tuple[Tensor | None, Iterator[Tensor]]:
    """The first box where it is known, and the frames.

    Raises:
        DataError: It is no video.
    """
    if isinstance(video, Video):
        return video.boxes[0], iter(video.frames)
    if isinstance(video, Tensor):
        if video.dim() != 4 or video.shape[1] != 3:
            raise DataError(f"frames are (T, 3, H, W) in 0..255, got a tensor of shape {tuple(video.shape)}")
        return None, iter(StoredFrames(video))
    return None, iter(open_video(video))


@contextmanager
def _evaluating(backbone: LoRAT, head: nn.Module) -> Iterator[None]:
    """Switch dropout off in a block, and back on where it was."""
    parts = [backbone, *backbone.adapters.values(), head]
    modes = [part.training for part in parts]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.train(mode)
