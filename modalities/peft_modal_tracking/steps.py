"""What a tracker remembers of one video, and how a frame becomes the network's input and its output a box.

Lin et al., ECCV 2024, arXiv:2403.05231, section 3.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from peft_modal.errors import DataError
from peft_modal_tracking.boxes import Size, clipped, is_box
from peft_modal_tracking.crops import CropMap, at_least, channel_means, crop, crop_map
from peft_modal_vision.transforms import NORMS, Normalize


@dataclass(frozen=True)
class CropSettings:
    """How template and search picture are cut out."""

    template_size: Size
    search_size: Size
    template_factor: float = 2.0
    """Area of the template over that of the box, roughly; see `crop_map`."""
    search_factor: float = 4.0
    normalize: Normalize = "half"
    min_object: float = 10.0
    """Shorter sides of a box count as this many pixels when a search picture is cut out."""

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it."""
        return {**asdict(self), "template_size": list(self.template_size), "search_size": list(self.search_size)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> CropSettings:
        """What `to_dict` gave.

        Raises:
            DataError: It is of something else.
        """
        try:
            sizes = {name: (int(h), int(w)) for name in _SIZES for h, w in [document[name]]}
            return cls(**{**document, **sizes})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the adapter file tells no crops of a tracker: {error}") from error


_SIZES = ("template_size", "search_size")


def normalised(pixels: Tensor, normalize: Normalize) -> Tensor:
    """A picture (3, h, w) in 0..255 as the network takes it."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in NORMS[normalize])
    return (pixels / 255 - mean) / deviation


class TrackState:
    """One target in one video.

    Args:
        frame: The first, (3, H, W) in 0..255.
        box: Of the target there, x1, y1, x2, y2, (4,).
        settings: Of the crops.

    Raises:
        DataError: The box has no area, or lies outside of the frame.
    """

    def __init__(self, frame: Tensor, box: Tensor, settings: CropSettings) -> None:
        box = box.to(torch.float32)
        size = (int(frame.shape[-2]), int(frame.shape[-1]))
        if not bool(box.isfinite().all() & is_box(box)):
            raise DataError(f"the first box {_told(box)} has no area; give x,y,width,height with a width and height")
        if not bool(is_box(clipped(box, size))):
            raise DataError(
                f"the first box {_told(box)} lies outside of the frame of {size[1]} x {size[0]} pixels; give one inside"
            )
        self.settings = settings
        self.box = clipped(box, size)
        """Where the target was seen last, (4,)."""
        self.fill = channel_means(frame)
        """Of the first frame; what surrounds later frames, too."""
        self.template_wanted = crop_map(box, settings.template_size, settings.template_factor)
        cut, self.template_map = crop(frame, self.template_wanted, settings.template_size, self.fill)
        self.template = normalised(cut, settings.normalize)
        """(3, h, w)."""
        self.template_box = self.template_map.to_crop(box)
        """In pixels of the template, (4,)."""
        self.wanted: CropMap = self.template_wanted
        self.map: CropMap = self.template_map

    def look(self, frame: Tensor) -> Tensor:
        """The search picture (3, h, w) of a frame (3, H, W), around where the target was seen last."""
        settings = self.settings
        around = at_least(self.box, settings.min_object)
        self.wanted = crop_map(around, settings.search_size, settings.search_factor)
        cut, self.map = crop(frame, self.wanted, settings.search_size, self.fill)
        return normalised(cut, settings.normalize)

    def update(self, found: Tensor, size: Size) -> Tensor:
        """Take in what the network found.

        Args:
            found: Box in pixels of the search picture that `look` gave last, (4,).
            size: Of the frame.

        Returns:
            The box in the frame, (4,); where it has an area it is where the target is looked for next.
        """
        box = clipped(self.map.to_image(found), size)
        if bool(is_box(box)):
            self.box = box
        return box


def _told(box: Tensor) -> str:
    return ",".join(f"{value:g}" for value in [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()])
