"""A video with a target: frames that are read when they are needed, boxes, and where the target is to be seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from peft_modal.data.images import image_size, read_image
from peft_modal.errors import DataError
from peft_modal_tracking.boxes import Size
from peft_modal_tracking.metrics import Rules


class Frames(Protocol):
    """The pictures of a video, (3, H, W) uint8 RGB each."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Tensor:
        """One of them."""

    def __iter__(self) -> Iterator[Tensor]:
        """All in order."""

    def size(self, index: int) -> Size:
        """Height and width of one of them."""


class StoredFrames:
    """Frames in memory.

    Args:
        pixels: (T, 3, H, W) uint8.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.pixels

    def size(self, index: int) -> Size:
        """Height and width."""
        del index
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])


class FrameFiles:
    """Frames in files, which may differ in size.

    Args:
        paths: In order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.asarray(read_image(self.paths[index])).copy()).permute(2, 0, 1)

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self)):
            yield self[index]

    def size(self, index: int) -> Size:
        """Height and width, from the file's header."""
        return image_size(self.paths[index])


class Video:
    """A sequence. Not a dataclass: Lightning would take its tensors apart on the way to a device.

    Args:
        name: As result files call it.
        frames: Its pictures.
        boxes: x, y, w, h from 0 of every frame, (T, 4) float32; of one frame only where no more is known.
        visible: Whether the target is to be seen, (T,) bool; None for always.
        rules: By which its one-pass evaluation counts absent frames.

    Raises:
        DataError: There is no frame, or numbers of frames and boxes differ.
    """

    def __init__(
        self, name: str, frames: Frames, boxes: Tensor, visible: Tensor | None = None, *, rules: Rules = "plain"
    ) -> None:
        if not len(frames):
            raise DataError(f"sequence '{name}' has no frames")
        if len(boxes) not in {1, len(frames)}:
            raise DataError(f"sequence '{name}' has {len(frames)} frames and {len(boxes)} boxes; each frame needs one")
        self.name = name
        self.frames = frames
        self.boxes = boxes.to(torch.float32)
        self.visible = torch.ones(len(boxes), dtype=torch.bool) if visible is None else visible.bool()
        if len(self.visible) != len(boxes):
            raise DataError(f"sequence '{name}' has {len(boxes)} boxes and {len(self.visible)} flags of visibility")
        self.rules: Rules = rules

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def has_truth(self) -> bool:
        """Whether every frame has a box; test splits tell the first one only."""
        return len(self.boxes) == len(self.frames)

    def usable(self) -> Tensor:
        """Numbers of the frames that show the target in a box of positive size, (n,) int64."""
        return (self.visible & (self.boxes[:, 2:] > 0).all(1)).nonzero()[:, 0]
