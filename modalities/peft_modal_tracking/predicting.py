"""`predict` of a tracker: a video and a box, or all sequences of a benchmark."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from peft_modal.attach.merge import merge_
from peft_modal.data.progress import progress
from peft_modal.errors import ConfigError, MergeError, nearest
from peft_modal.extras import require
from peft_modal.files import read_index, write_text
from peft_modal.tasks.predicting import PredictRequest
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.layouts import LAYOUTS, find_sequences
from peft_modal_tracking.results import FORMATS, lines, write_results
from peft_modal_tracking.sequences import Video
from peft_modal_tracking.steps import CropSettings
from peft_modal_tracking.tracker import Track, Tracker
from peft_modal_tracking.video_files import drawn, open_video, write_video

_LOG: Final = logging.getLogger(__name__)


def check_request(request: PredictRequest) -> None:
    """Refuse what cannot be followed, before weights are loaded.

    Raises:
        ConfigError: Input, box or layout are missing or do not go together.
        MissingExtraError: PyAV is not installed.
    """
    flags = request.flags
    if request.input is None:
        raise ConfigError("peft-modal predict: --input PATH is missing: a video, a folder of frames, or a data set")
    if ("box" in flags) == ("layout" in flags):
        raise ConfigError(
            "peft-modal predict: give either --box X,Y,W,H for one video, or --layout NAME for the sequences of a "
            f"data set, whose first boxes are known ({', '.join(LAYOUTS)})"
        )
    if "box" in flags:
        parse_box(flags["box"])
        require("av", extra="tracking")  # for the clip that is written in the end
    for name, known in (("layout", LAYOUTS), ("results", FORMATS)):
        if name in flags and flags[name] not in known:
            raise ConfigError(f"--{name}: '{flags[name]}' is unknown; {nearest(flags[name], known)}")


def parse_box(text: str) -> Tensor:
    """x, y, w, h (4,) float32 of `10,20,50,60`.

    Raises:
        ConfigError: It is something else.
    """
    parts = re.split(r"[,\s]+", text.strip())
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise ConfigError(f"--box: '{text}' is no box; write X,Y,WIDTH,HEIGHT in pixels, such as 10,20,50,60")
    return torch.tensor(numbers)


def predict_request(
    request: PredictRequest, backbone: LoRAT, head: nn.Module, window_penalty: float
) -> list[dict[str, Any]]:
    """Follow what was asked for.

    Writes `boxes/NAME.txt` (x,y,w,h from 0), for one video also `NAME.mp4` with the box drawn, and with `--results` the
    files of a toolkit.

    Args:
        request: What was asked for; checked.
        backbone: With its adapters, which are folded into it.
        head: Of the tracker.
        window_penalty: See `Tracker`.

    Returns:
        A row for each video.
    """
    assert request.input is not None
    _, header = read_index(Path(request.adapters[0][0]))
    try:
        merge_(backbone)
    except MergeError as error:
        _LOG.warning("the adapter stays beside the network: %s", error)
    settings = CropSettings.from_dict(header.preprocessing)
    tracker = Tracker(backbone, head, settings, window_penalty=window_penalty)
    single = "box" in request.flags
    if single:
        frames = open_video(request.input)
        name = request.input.resolve().stem or "video"
        videos = [Video(name, frames, parse_box(request.flags["box"])[None])]
    else:
        videos = find_sequences(request.input, request.flags["layout"])
    with progress("frames", sum(len(video) for video in videos) - len(videos)) as advance:
        tracks = dict(zip([video.name for video in videos], tracker.track_all(videos, advance=advance), strict=True))
    rows = []
    for video in videos:
        track = tracks[video.name]
        boxes = Path("boxes") / f"{video.name}.txt"
        write_text(request.out / boxes, lines(track.boxes, ",", 3))
        row = {
            "video": video.name, "frames": len(track.boxes), "boxes": boxes.as_posix(),
            "score": round(float(track.scores[1:].mean()), 4) if len(track.scores) > 1 else None,
            "frames_per_second": round(track.frames_per_second, 2),
        }  # fmt: skip
        if single:
            clip = Path(f"{video.name}.mp4")
            rate: Fraction | int = getattr(video.frames, "rate", 25)
            write_video(request.out / clip, _with_boxes(video, track), rate=rate)
            row["clip"] = clip.as_posix()
        rows.append(row)
    if "results" in request.flags:
        one_based = request.flags.get("layout") == "lasot"
        write_results(request.out, tracks, request.flags["results"], one_based=one_based)
    return rows


def _with_boxes(video: Video, track: Track) -> Iterator[Tensor]:
    """Its frames with the box that was found drawn in each.

    Yields:
        (3, H, W) uint8.
    """
    for frame, box in zip(video.frames, track.boxes, strict=True):
        yield drawn(frame, box)
