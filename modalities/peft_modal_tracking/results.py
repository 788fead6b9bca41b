"""Result files as the benchmarks' toolkits and servers take them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from peft_modal.files import write_bytes, write_text
from peft_modal_tracking.boxes import rasterised, to_corners, to_sizes
from peft_modal_tracking.tracker import Track

ResultFormat = Literal["got10k", "trackingnet", "lasot", "otb", "pytracking"]
FORMATS: tuple[ResultFormat, ...] = get_args(ResultFormat)


def write_results(
    out: Path, tracks: Mapping[str, Track], form: ResultFormat, *, tracker: str = "lorat", one_based: bool = False
) -> list[Path]:
    """Write the boxes of every sequence, a line for each frame, the first included.

    `got10k`: `TRACKER/SEQ/SEQ_001.txt` with times beside it, `trackingnet`: `TRACKER.zip` of `SEQ.txt`, both in whole
    pixels as LoRAT's own submissions; `lasot`: `TRACKER_tracking_result/SEQ.txt`, counted from 1; `otb`:
    `results/OTB2015/TRACKER/SEQ.txt` with times; `pytracking`: `TRACKER/SEQ.txt`, tabs.

    Args:
        out: The folder.
        tracks: By the name of the sequence.
        form: Which.
        tracker: What the tracker is called.
        one_based: Count x and y from 1 with `pytracking`, as its LaSOT files do.

    Returns:
        The files.
    """
    if form == "trackingnet":
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, track in tracks.items():
                # A fixed date, so that equal results are equal files.
                archive.writestr(zipfile.ZipInfo(f"{name}.txt"), lines(_whole(track.boxes), ",", 2))
        write_bytes(out / f"{tracker}.zip", content.getvalue())
        return [out / f"{tracker}.zip"]
    written = []
    for name, track in tracks.items():
        for path, text in _files(name, track, form, tracker, one_based=one_based).items():
            write_text(out / path, text)
            written.append(out / path)
    return written


def lines(boxes: Tensor, delimiter: str, digits: int, *, from_one: bool = False) -> str:
    """A line of x, y, w, h for each of (T, 4)."""
    rows = boxes.double().clone()
    rows[:, :2] += float(from_one)
    return "".join(delimiter.join(f"{value:.{digits}f}" for value in row) + "\n" for row in rows.tolist())


def _files(name: str, track: Track, form: ResultFormat, tracker: str, *, one_based: bool) -> dict[Path, str]:
    times = "".join(f"{value:.8f}\n" for value in track.seconds.tolist())
    if form == "got10k":
        folder = Path(tracker) / name
        return {folder / f"{name}_001.txt": lines(_whole(track.boxes), ",", 4), folder / f"{name}_time.txt": times}
    if form == "lasot":
        return {Path(f"{tracker}_tracking_result") / f"{name}.txt": lines(track.boxes, ",", 3, from_one=True)}
    if form == "otb":
        folder = Path("results") / "OTB2015" / tracker
        return {
            folder / f"{name}.txt": lines(track.boxes, ",", 3),
            folder / "times" / f"{name}_time.txt": times,
        }
    return {Path(tracker) / f"{name}.txt": lines(track.boxes, "\t", 3, from_one=one_based)}


def _whole(boxes: Tensor) -> Tensor:
    return to_sizes(rasterised(to_corners(boxes.double())))
