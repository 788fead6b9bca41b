"""From a picture of any size to the square that a network reads, and what changes it at random while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from peft_modal.errors import ConfigError

Resize = Literal["square", "crop", "fit"]
Augmentation = Literal["flip", "crop", "resized_crop", "colour", "erase", "mixup", "cutmix"]
Normalize = Literal["half", "imagenet", "clip", "none"]
NORMS: Final[Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]] = MappingProxyType(
    {
        "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }
)
"""Mean and deviation of each channel, of pictures in 0..1."""
CROP_RATIO: Final = 256 / 224
_RATIOS: Final[Mapping[str, float]] = MappingProxyType({"crop": CROP_RATIO, "fit": 1.0})
"""The shorter side before a crop over the crop's side."""
CROP_SCALE: Final = (0.08, 1.0)
"""Shares of the area that `resized_crop` takes."""
_BICUBIC: Final = InterpolationMode.BICUBIC


def normalized(images: Tensor, normalize: str) -> dict[str, Tensor]:
    """`image`, `mean` and `deviation` of a batch of pictures (B, 3, S, S) in 0..1."""
    mean, deviation = (torch.tensor(values) for values in NORMS[normalize])
    image = (images - mean[:, None, None]) / deviation[:, None, None]
    count = len(images)
    return {"image": image, "mean": mean.expand(count, 3), "deviation": deviation.expand(count, 3)}


def evaluation_view(image: Image.Image, side: int, resize: Resize) -> Tensor:
    """The square (3, S, S) in 0..1 of an RGB picture.

    Args:
        image: The picture.
        side: S.
        resize: `square` ignores the ratio of its sides, as VTAB-1k does; `crop` makes the shorter side 256/224 of S and
            cuts S out of the middle, as FGVC does; `fit` makes it S before that, as CLIP does.
    """
    return _tensor(_squared(image, side, resize))


def _squared(image: Image.Image, side: int, resize: Resize) -> Image.Image:
    if resize == "square":
        return functional.resize(image, [side, side], interpolation=_BICUBIC)
    image = functional.resize(image, [round(side * _RATIOS[resize])], interpolation=_BICUBIC)
    return functional.center_crop(image, [side, side])


class TrainingView:
    """The square of a training picture, changed at random.

    Args:
        side: S.
        resize: See `evaluation_view`.
        augment: `flip` mirrors half of them; `crop` cuts S anywhere out of what `crop` resizes to; `resized_crop` takes
            a share of the area at a ratio of 3/4 to 4/3; `colour` jitters brightness, contrast and saturation by
            0.4; `erase` fills a rectangle of a quarter of them with noise. `mixup` and `cutmix` concern batches; see
            `mixed`.
        crop_scale: Least and largest share of the area for `resized_crop`.

    Raises:
        ConfigError: `crop_scale` is no range.
    """

    def __init__(
        self,
        side: int,
        resize: Resize,
        augment: Sequence[Augmentation],
        crop_scale: tuple[float, float] = CROP_SCALE,
    ) -> None:
        least, largest = crop_scale
        if not 0 < least <= largest <= 1:
            raise ConfigError(f"data.crop_scale: expected two shares above 0 by their size, got {list(crop_scale)}")
        self.side = side
        self.resize: Resize = resize
        chosen: list[Any] = []
        if "resized_crop" in augment:
            chosen.append(v2.RandomResizedCrop([side, side], scale=crop_scale, interpolation=_BICUBIC))
        elif "crop" in augment:
            chosen += [
                v2.Resize([round(side * CROP_RATIO)], interpolation=_BICUBIC),
                v2.RandomCrop([side, side], pad_if_needed=True),
            ]
        self.is_cut = bool(chosen)
        if "flip" in augment:
            chosen.append(v2.RandomHorizontalFlip())
        if "colour" in augment:
            chosen.append(v2.ColorJitter(0.4, 0.4, 0.4))
        self.on_picture = v2.Compose(chosen) if chosen else None
        self.on_tensor = v2.RandomErasing(p=0.25, value="random") if "erase" in augment else None

    def __call__(self, image: Image.Image, generator: Generator) -> Tensor:
        """The square (3, S, S) in 0..1; all random numbers follow from `generator`."""
        # torchvision draws from the global numbers.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            if not self.is_cut:
                image = _squared(image, self.side, self.resize)
            if self.on_picture is not None:
                image = self.on_picture(image)
            pixels = _tensor(image)
            return pixels if self.on_tensor is None else self.on_tensor(pixels).clamp(0, 1)


def _tensor(image: Image.Image) -> Tensor:
    pixels: Tensor = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)
    return pixels.as_subclass(Tensor)
