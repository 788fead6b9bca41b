"""Square cut-outs around a target: where they lie, how they are snapped to whole pixels, how they are filled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from peft_modal_tracking.boxes import Size, clipped, rasterised


@dataclass(frozen=True)
class CropMap:
    """crop = image * scale + shift, for x and y."""

    scale: Tensor
    """(2,) float32."""
    shift: Tensor
    """(2,) float32."""

    def to_crop(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) of the image in pixels of the crop."""
        return boxes * self.scale.repeat(2) + self.shift.repeat(2)

    def to_image(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) of the crop in pixels of the image."""
        return (boxes - self.shift.repeat(2)) / self.scale.repeat(2)


def crop_map(box: Tensor, size: Size, area_factor: float) -> CropMap:
    """The map of the crop whose centre is the box's, with context around it.

    With m the mean side of the box, the crop covers (w + (a - 1) m)(h + (a - 1) m) of the image, at one scale for x
    and y.

    Args:
        box: (4,), of positive size.
        size: Of the crop.
        area_factor: a.
    """
    sides = box[2:] - box[:2]
    area = (sides + (area_factor - 1) * sides.mean()).prod()
    scale = (size[0] * size[1] / area).sqrt().expand(2)
    middle = torch.tensor([size[1] / 2, size[0] / 2], dtype=box.dtype)
    return CropMap(scale, middle - (box[:2] + box[2:]) / 2 * scale)


def crop(image: Tensor, wanted: CropMap, size: Size, fill: Tensor) -> tuple[Tensor, CropMap]:
    """Cut out, as whole pixels: an integer part of the image is resized to an integer part of the crop.

    Args:
        image: (3, H, W), float or uint8, in 0..255.
        wanted: Where.
        size: Of the crop.
        fill: Colour of what lies outside of the image, (3,), in 0..255.

    Returns:
        The crop (3, h, w) float32 in 0..255, and the map that it really follows; boxes are mapped by this one.
    """
    out = fill.to(torch.float32)[:, None, None].expand(3, *size).clone()
    height, width = image.shape[-2:]
    whole = torch.tensor([0, 0, width, height], dtype=torch.float32)
    target = rasterised(clipped(wanted.to_crop(whole), size))
    source = clipped(rasterised(wanted.to_image(target.float())), (height, width))
    if bool((target[2:] <= target[:2]).any() or (source[2:] <= source[:2]).any()):
        return out, wanted
    (x1, y1, x2, y2), (u1, v1, u2, v2) = target.tolist(), source.tolist()
    part = image[:, v1:v2, u1:u2].to(torch.float32)
    resized = functional.interpolate(
        part[None], size=(y2 - y1, x2 - x1), mode="bilinear", align_corners=False, antialias=False
    )
    out[:, y1:y2, x1:x2] = resized[0]
    scale = (target[2:] - target[:2]).float() / (source[2:] - source[:2]).float()
    return out, CropMap(scale, target[:2].float() - source[:2].float() * scale)


def channel_means(image: Tensor) -> Tensor:
    """The mean colour (3,) float32 of an image (3, H, W)."""
    return image.to(torch.float32).mean((1, 2))


def at_least(box: Tensor, least: float) -> Tensor:
    """A box (4,) with its centre, its width and height at least so many pixels."""
    middle, sides = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).clamp(min=least)
    return torch.cat([middle - sides / 2, middle + sides / 2])
