"""From a picture of any size to the square that CLIP's image tower reads."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional


def evaluation_view(image: Image.Image, side: int) -> Tensor:
    """The middle square (3, S, S) in 0..1 of an RGB picture whose shorter side is made S, bicubic as PIL does it."""
    image = functional.resize(image, [side], interpolation=InterpolationMode.BICUBIC)
    square: Tensor = functional.to_dtype(
        functional.to_image(functional.center_crop(image, [side, side])), torch.float32, scale=True
    )
    return square
