"""Sequences in the layouts of the benchmarks: GOT-10k, LaSOT, TrackingNet, OTB, and a folder of your own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from peft_modal.data.splits import Part
from peft_modal.errors import DataError, nearest
from peft_modal_tracking.metrics import Rules
from peft_modal_tracking.sequences import FrameFiles, Frames, Video
from peft_modal_tracking.video_files import VIDEO_SUFFIXES, FolderFrames, frame_files, numbered, open_video

Layout = Literal["got10k", "lasot", "trackingnet", "otb", "folder"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_STARTS: Final = {"BlurCar1": (247, 988), "BlurCar3": (3, 359), "BlurCar4": (18, 397), "David": (300, 770)}
"""OTB: numbers of the first and last frame where these are not the first and last file."""
_ENDS: Final = {"Football1": 74, "Freeman3": 460, "Freeman4": 283, "Diving": 215}
"""OTB: numbers of the last frame."""


def got10k_sequence(folder: Path) -> Video:
    """One of GOT-10k: frames, `groundtruth.txt`, and where they are there `absence.label` and `cover.label`."""
    boxes = read_boxes(folder / "groundtruth.txt")
    visible = torch.ones(len(boxes), dtype=torch.bool)
    if (folder / "absence.label").is_file():
        visible &= _flags(folder / "absence.label", len(boxes)) == 0
    if (folder / "cover.label").is_file():
        visible &= _flags(folder / "cover.label", len(boxes)) > 0
    return _video(folder.name, _frames(folder, boxes), boxes, visible, where=folder)


def lasot_sequence(folder: Path) -> Video:
    """One of LaSOT: `img`, `groundtruth.txt` counted from 1, `full_occlusion.txt` and `out_of_view.txt`."""
    boxes = read_boxes(folder / "groundtruth.txt")
    boxes[:, :2] -= 1
    absent = torch.zeros(len(boxes), dtype=torch.bool)
    for name in ("full_occlusion.txt", "out_of_view.txt"):
        if (folder / name).is_file():
            absent |= _flags(folder / name, len(boxes)) != 0
    # monkey-17 has more pictures than boxes.
    frames = FolderFrames(_existing(folder / "img"), len(boxes), first=True)
    return _video(folder.name, frames, boxes, ~absent, where=folder, rules="lasot")


def trackingnet_sequence(chunk: Path, name: str) -> Video:
    """One of TrackingNet: `frames/NAME/0.jpg` ... and `anno/NAME.txt` below a chunk such as `TRAIN_0` or `TEST`."""
    boxes = read_boxes(chunk / "anno" / f"{name}.txt")
    frames = _existing(chunk / "frames" / name)
    return _video(name, _frames(frames, boxes), boxes, None, where=frames)


def otb_sequences(folder: Path) -> list[Video]:
    """Those of one folder of OTB: one, or two where there are two targets; x and y are taken as they are.

    Raises:
        DataError: There is no file with boxes.
    """
    name = folder.name
    files = sorted(folder.glob("groundtruth_rect*.txt"), key=lambda p: numbered(p.stem))
    # Human4's first file is empty.
    files = [file for file in files if file.read_text(encoding="utf-8").strip()]
    if not files:
        raise DataError(f"'{folder}' has no groundtruth_rect.txt with boxes")
    pictures = frame_files(_existing(folder / "img"))
    first, last = _STARTS.get(name, (0, _ENDS.get(name, 10**9)))
    pictures = [p for p in pictures if first <= int(re.findall(r"\d+", p.stem)[-1]) <= last]
    out = []
    for file in files:
        boxes = read_boxes(file)
        suffix = re.fullmatch(r"groundtruth_rect\.(\d+)", file.stem)
        called = f"{name}_{suffix[1]}" if suffix and len(files) > 1 else name
        frames = FrameFiles(pictures[: len(boxes)] if len(boxes) > 1 else pictures)
        out.append(_video(called, frames, boxes, None, where=file))
    return out


def own_sequence(folder: Path) -> Video:
    """One of your own: frames and `groundtruth.txt`, x,y,w,h from 0 of every frame or of the first.

    `absence.txt`, where it is there, holds a 1 for each frame that does not show the target. A video file in place of
    the frames serves, too.
    """
    boxes = read_boxes(folder / "groundtruth.txt")
    clips = [p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES]
    frames: Frames = open_video(clips[0]) if len(clips) == 1 else FrameFiles(frame_files(folder))
    visible = None
    if (folder / "absence.txt").is_file():
        visible = _flags(folder / "absence.txt", len(boxes)) == 0
    return _video(folder.name, frames, boxes, visible, where=folder)


def find_sequences(root: Path, layout: Layout, part: Part | None = None) -> list[Video]:
    """All sequences of a split, none where there is no such split; or all of the whole folder.

    Args:
        root: The data set's folder.
        layout: Which.
        part: The split; None for whatever lies below `root`.

    Raises:
        DataError: There is no such folder, none of its sequences is of this layout, or one cannot be read.
    """
    makers: dict[Layout, Callable[[Path, Part | None], list[Video]]] = {
        "got10k": _got10k, "lasot": _lasot, "trackingnet": _trackingnet, "otb": _otb, "folder": _own,
    }  # fmt: skip
    found = makers[layout](_existing(root), part)
    if not found and part is None:
        raise DataError(f"'{root}' has no sequences of layout '{layout}'")
    return found


def _split_folder(root: Path, part: Part | None) -> Path | None:
    """Where a split lies; the whole folder where it is not split, whose sequences are to train on."""
    if part is None or not any((root / name).is_dir() for name in ("train", "val", "test")):
        return root if part in {None, "train"} else None
    return root / part if (root / part).is_dir() else None


def _got10k(root: Path, part: Part | None) -> list[Video]:
    folder = _split_folder(root, part)
    if folder is None:
        return []
    listed = folder / "list.txt"
    names = listed.read_text(encoding="utf-8").split() if listed.is_file() else _folders_with(folder, "groundtruth.txt")
    return [got10k_sequence(_existing(folder / name)) for name in names]


def _lasot(root: Path, part: Part | None) -> list[Video]:
    lists = {"train": root / "training_set.txt", "test": root / "testing_set.txt"}
    if part is not None and any(path.is_file() for path in lists.values()):
        if part not in lists or not lists[part].is_file():
            return []
        names = lists[part].read_text(encoding="utf-8").split()
        return [lasot_sequence(_existing(_lasot_folder(root, name))) for name in names]
    if part not in {None, "train"}:
        return []
    found = sorted({p.parent for p in root.rglob("groundtruth.txt")}, key=lambda p: numbered(str(p)))
    return [lasot_sequence(folder) for folder in found]


def _lasot_folder(root: Path, name: str) -> Path:
    nested = root / name.rpartition("-")[0] / name
    return nested if nested.is_dir() else root / name


def _trackingnet(root: Path, part: Part | None) -> list[Video]:
    wanted = {"train": "TRAIN_*", "test": "TEST", None: "T*", "val": None}[part]
    if wanted is None:
        return []
    chunks = sorted((p for p in root.glob(wanted) if (p / "anno").is_dir()), key=lambda p: numbered(p.name))
    if not chunks and part is None and (root / "anno").is_dir():
        chunks = [root]
    # Names may begin with "-" and hold "_": they are taken as they are.
    return [
        trackingnet_sequence(chunk, file.name.removesuffix(".txt"))
        for chunk in chunks
        for file in sorted((chunk / "anno").glob("*.txt"))
    ]


def _otb(root: Path, part: Part | None) -> list[Video]:
    folders = [p for p in sorted(root.iterdir()) if (p / "img").is_dir()] if part in {None, "test"} else []
    return [video for folder in folders for video in otb_sequences(folder)]


def _own(root: Path, part: Part | None) -> list[Video]:
    folder = _split_folder(root, part)
    if folder is None:
        return []
    return [own_sequence(folder / name) for name in _folders_with(folder, "groundtruth.txt")]


def read_boxes(path: Path) -> Tensor:
    """x, y, w, h of every line, (n, 4) float32; numbers parted by commas, tabs or blanks.

    Raises:
        DataError: The file is missing, empty, or holds something else.
    """
    rows = _numbers(path)
    if rows.ndim != 2 or rows.shape[1] != 4 or not len(rows):
        raise DataError(f"'{path}' should hold four numbers x, y, w, h in each line, got an array of {rows.shape}")
    return torch.from_numpy(rows.astype(np.float32))


def _flags(path: Path, count: int) -> Tensor:
    """Numbers of each frame, in one line or in one each.

    Raises:
        DataError: There are not as many as frames.
    """
    values = _numbers(path).reshape(-1)
    if len(values) < count:
        raise DataError(f"'{path}' has {len(values)} flags for {count} boxes")
    return torch.from_numpy(values[:count])


def _numbers(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"'{path}' does not exist")
    text = re.sub(r"[,\t; ]+", " ", path.read_text(encoding="utf-8").strip())
    try:
        rows = [[float(value) for value in line.split()] for line in text.splitlines() if line.strip()]
        return np.asarray(rows, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"'{path}' cannot be read as numbers: {error}") from error


def _frames(folder: Path, boxes: Tensor) -> FolderFrames:
    """As many as boxes; of a test split, which tells the first box only, all."""
    return FolderFrames(folder, len(boxes) if len(boxes) > 1 else None)


def _video(
    name: str, frames: Frames, boxes: Tensor, visible: Tensor | None, *, where: Path, rules: Rules = "plain"
) -> Video:
    try:
        return Video(name, frames, boxes.nan_to_num(0.0), visible, rules=rules)
    except DataError as error:
        raise DataError(f"'{where}': {error}") from error


def _folders_with(root: Path, file: str) -> Sequence[str]:
    return sorted((p.parent.name for p in root.glob(f"*/{file}")), key=numbered)


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    raise DataError(f"'{folder}' is not a folder; {nearest(folder.name, siblings)}")
