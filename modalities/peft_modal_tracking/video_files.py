"""Reading and writing of video files and folders of frames."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from peft_modal.data.images import SUFFIXES
from peft_modal.errors import DataError
from peft_modal.extras import require
from peft_modal.files import replacing
from peft_modal_tracking.boxes import Size
from peft_modal_tracking.sequences import FrameFiles, Frames

VIDEO_SUFFIXES: Final = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")
_COLOUR: Final = (57, 255, 20)


def open_video(path: str | Path) -> Frames:
    """The frames of a video file or of a folder of pictures.

    Raises:
        DataError: There is neither.
        MissingExtraError: PyAV, which reads video files, is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFiles(frame_files(path))
    if not path.is_file():
        raise DataError(f"'{path}' is neither a video file nor a folder of frames")
    return VideoFile(path)


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder by the number in their names, so that 10 comes after 2.

    Raises:
        DataError: There are none.
    """
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise DataError(f"'{folder}' has no frames: no file whose name ends like a picture's")
    return sorted(found, key=lambda p: numbered(p.stem))


def numbered(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts if part)


class FolderFrames(FrameFiles):
    """The pictures of a folder that is not listed before one of them is read: data sets have a million.

    Args:
        folder: Where they lie.
        count: How many there have to be, as the boxes say; None for as many as there are.
        first: Take the first `count` where there are more.
    """

    def __init__(self, folder: Path, count: int | None = None, *, first: bool = False) -> None:
        self.folder = folder
        self.count = count
        self.first = first
        self._paths: tuple[Path, ...] | None = None

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]  # what the base keeps is listed here when needed
        """In order.

        Raises:
            DataError: There are not as many as boxes.
        """
        if self._paths is None:
            found = frame_files(self.folder)
            if self.count is not None and (len(found) < self.count or (len(found) > self.count and not self.first)):
                raise DataError(f"'{self.folder}' has {len(found)} frames and {self.count} boxes; each frame needs one")
            self._paths = tuple(found[: self.count])
        return self._paths

    def __len__(self) -> int:
        return len(self.paths) if self.count is None else self.count


class VideoFile:
    """Frames of a video file, decoded one after the other by PyAV.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be read, or holds no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._av: Any = require("av", extra="tracking")
        with self._opened() as container:
            stream = container.streams.video[0]
            self.rate: Fraction = Fraction(stream.average_rate or 25)
            self._size: Size = (int(stream.height), int(stream.width))
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self)
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        for number, frame in enumerate(self):
            if number == index:
                return frame
        raise IndexError(index)

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        with self._opened() as container:
            try:
                for frame in container.decode(video=0):
                    count += 1
                    yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            except self._av.error.FFmpegError as error:
                raise DataError(f"'{self.path}' is damaged after frame {count}: {_line(error)}") from error

    def size(self, index: int) -> Size:
        """Height and width."""
        del index
        return self._size

    def _opened(self) -> Any:  # noqa: ANN401 — a class of PyAV
        try:
            container = self._av.open(str(self.path))
        except (self._av.error.FFmpegError, OSError) as error:
            raise DataError(f"'{self.path}' cannot be read as a video: {_line(error)}") from error
        if not container.streams.video:
            container.close()
            raise DataError(f"'{self.path}' holds no video")
        return container


def write_video(path: Path, frames: Iterable[Tensor], *, rate: Fraction | int = 25) -> int:
    """Write frames (3, H, W) uint8 as H.264, atomically; gives their number.

    All are brought to the size of the first; odd sides lose a pixel, which the codec demands.

    Raises:
        DataError: There is no frame.
    """
    av: Any = require("av", extra="tracking")
    count = 0
    with replacing(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        stream = None
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "20"})
                stream.width, stream.height = picture.width // 2 * 2, picture.height // 2 * 2
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(picture.reformat(stream.width, stream.height, format="yuv420p")))
            count += 1
        if stream is None:
            raise DataError(f"'{path}': there is no frame to write")
        container.mux(stream.encode())
    return count


def drawn(frame: Tensor, box: Tensor, *, colour: Sequence[int] = _COLOUR) -> Tensor:
    """A copy of a frame (3, H, W) with a box x, y, w, h drawn in it."""
    height, width = frame.shape[-2:]
    thick = max(1, round(min(height, width) / 160))
    x1, y1 = (int(np.floor(v)) for v in box[:2].tolist())
    x2, y2 = (int(np.ceil(v)) for v in (box[:2] + box[2:]).tolist())
    out = frame.clone()
    tint = torch.tensor(colour, dtype=frame.dtype)[:, None, None]
    spans = (
        (y1, y1 + thick, x1, x2), (y2 - thick, y2, x1, x2), (y1, y2, x1, x1 + thick), (y1, y2, x2 - thick, x2),
    )  # fmt: skip
    for top, bottom, left, right in spans:
        rows, columns = slice(max(0, top), max(0, bottom)), slice(max(0, left), max(0, right))
        out[:, rows, columns] = tint
    return out


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
