"""Pictures of a split as samples, and the training batches made of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, default_collate

from peft_modal.data.captions import Captioned
from peft_modal.data.epochs import Batch
from peft_modal.data.images import MAX_MEGAPIXELS, image_size, read_image
from peft_modal.data.sample_cache import SampleCache
from peft_modal.data.splits import ShuffledBatches
from peft_modal.errors import DataError
from peft_modal_diffusion.transforms import Placement, Size, cut, nearest_bucket, place

_LOG = logging.getLogger(__name__)

Crop = Literal["centre", "random"]


@dataclass(frozen=True)
class Framing:
    """How a picture becomes what the network is trained on."""

    resolution: int
    crop: Crop = "centre"
    flip: bool = False
    """Mirror half of the pictures left to right."""
    buckets: tuple[Size, ...] = ()
    """Shapes to choose from; () for the square alone."""

    def target(self, size: Size) -> Size:
        """The shape that a picture of a size is cut to."""
        return nearest_bucket(size, self.buckets) if self.buckets else (self.resolution, self.resolution)

    def fixed(self) -> Framing:
        """The same without anything random, for evaluation."""
        return replace(self, crop="centre", flip=False)


@dataclass(frozen=True)
class Choice:
    """What is chosen at random for one sample of a batch."""

    caption: float = 0.0
    """In [0, 1): which of the captions."""
    flip: bool = False
    shift: tuple[float, float] | None = None
    """See `place`."""


@dataclass(frozen=True)
class Picture:
    """An image file with what its header tells."""

    path: Path
    captions: tuple[str, ...]
    size: Size
    target: Size


def look_at(images: Iterable[Captioned], framing: Framing) -> tuple[Picture, ...]:
    """Read the headers of images, and tell once if some have to be enlarged.

    Raises:
        DataError: A file is no image, too small, too large, or too long for its width.
    """
    pictures, small = [], []
    for image in images:
        size = image_size(image.path)
        picture = Picture(image.path, image.captions, size, framing.target(size))
        resized = place(size, picture.target).resized
        if resized[0] * resized[1] > MAX_MEGAPIXELS * 10**6:
            raise DataError(
                f"'{image.path}' has {size[1]}x{size[0]} pixels, which become {resized[1]}x{resized[0]} to cover "
                f"{picture.target[1]}x{picture.target[0]}; cut it into pieces or leave it out."
            )
        pictures.append(picture)
        if resized[0] > size[0] or resized[1] > size[1]:
            small.append(picture)
    if small:
        least = min(small, key=lambda picture: picture.size[0] * picture.size[1])
        _LOG.warning(
            "%d of %d images are smaller than what they are trained at and are enlarged; the smallest, '%s', has %dx%d "
            "pixels for %dx%d",
            len(small), len(pictures), least.path, *reversed(least.size), *reversed(least.target),
        )  # fmt: skip
    return tuple(pictures)


class ImageSet(Dataset[Batch]):
    """Pictures of a split, read when they are asked for.

    A sample holds `pixels` (3, H, W) float32 in [-1, 1], or `latent_mean` and `latent_std` instead where `latents` is
    set; `caption`; `original_size`, `crop` and `target_size`, int64 (2,), as SDXL is told them: (height, width) of the
    upright picture, (top, left) of the crop after resizing, (height, width) of the crop; and `key`, the name of these
    pixels: it follows from the file's content, the shape and the flip.

    Args:
        pictures: Which.
        framing: How they are cut.
    """

    def __init__(self, pictures: Sequence[Picture], framing: Framing) -> None:
        self.pictures = tuple(pictures)
        self.framing = framing
        self.latents: SampleCache | None = None
        self._digests: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Batch:
        """A picture as evaluation sees it: first caption, cut from the centre."""
        return self.sample(index, Choice())

    def draw(self, generator: Generator) -> Choice:
        """A choice as the framing allows it; takes the same count of numbers whatever it allows."""
        caption, flip, *shift = torch.rand(4, generator=generator).tolist()
        is_random = self.framing.crop == "random"
        return Choice(caption, self.framing.flip and flip < 0.5, (shift[0], shift[1]) if is_random else None)

    def sample(self, index: int, choice: Choice) -> Batch:
        """One sample.

        Raises:
            DataError: The file cannot be read, or its latents have vanished from the cache.
        """
        picture = self.pictures[index]
        placement = self._placement(picture, choice)
        key = self.key(index, flip=choice.flip)
        pixels = {"pixels": self.pixels(index, choice)} if self.latents is None else self._latents_of(picture, key)
        return {
            **pixels,
            "caption": picture.captions[int(choice.caption * len(picture.captions))],
            "original_size": torch.tensor(placement.original),
            "crop": torch.tensor(placement.crop),
            "target_size": torch.tensor(placement.target),
            "key": key,
        }

    def pixels(self, index: int, choice: Choice) -> Tensor:
        """The pixels of one sample, (3, H, W) in [-1, 1].

        Raises:
            DataError: The file cannot be read.
        """
        picture = self.pictures[index]
        return cut(read_image(picture.path), self._placement(picture, choice))

    def key(self, index: int, *, flip: bool) -> str:
        """The name of a picture's pixels, where it is cut from the centre."""
        picture = self.pictures[index]
        digest = self._digests.get(picture.path)
        if digest is None:
            with picture.path.open("rb") as stream:
                digest = self._digests[picture.path] = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
        height, width = picture.target
        return f"{digest}-{height}x{width}{'-flipped' if flip else ''}"

    def variants(self) -> Iterator[tuple[int, bool]]:
        """What the cache of latents has to hold.

        Yields:
            Index and flip.
        """
        for index in range(len(self)):
            yield from ((index, flip) for flip in ((False, True) if self.framing.flip else (False,)))

    def _placement(self, picture: Picture, choice: Choice) -> Placement:
        return place(picture.size, picture.target, shift=choice.shift, flip=choice.flip)

    def _latents_of(self, picture: Picture, key: str) -> dict[str, Tensor]:
        assert self.latents is not None
        stored = self.latents.get(key)
        if stored is None:
            raise DataError(
                f"the cached latents of '{picture.path}' are gone or damaged ('{self.latents.folder}'); repeat the "
                "command: they are made again."
            )
        return {f"latent_{name}": tensor for name, tensor in stored.items()}


class TrainBatches(ShuffledBatches):
    """The `BatchSource` of a training set: captions, flips and crops are chosen anew in every batch.

    Args:
        images: The set.
        batch_size: Pictures per batch; the last batch of an epoch, or of a bucket, may be smaller.
        seed: Of order and choices.
        groups: See `ShuffledBatches`.
    """

    def __init__(self, images: ImageSet, batch_size: int, *, seed: int, groups: Sequence[Size] | None = None) -> None:
        super().__init__(images, batch_size, seed=seed, groups=groups, drop_last=False)
        self.images = images

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """The batch of these pictures."""
        return default_collate([self.images.sample(i, self.images.draw(generator)) for i in chosen])


class SubjectBatches(ShuffledBatches):
    """Pictures of a subject followed by as many of its class, as DreamBooth with prior preservation takes them.

    An epoch is as long as the larger of the two sets; the smaller one is gone through again and again (Ruiz et al.,
    CVPR 2023, arXiv:2208.12242; the order of diffusers' script). The batch's `prior` (2B,) bool tells them apart.

    Args:
        instances: Pictures of the subject.
        priors: Pictures of its class, or None to train without.
        batch_size: Pictures of each.
        seed: Of order and choices.
    """

    def __init__(self, instances: ImageSet, priors: ImageSet | None, batch_size: int, *, seed: int) -> None:
        length = max(len(instances), len(priors) if priors else 0)
        super().__init__(range(length), batch_size, seed=seed, drop_last=False)
        self.instances = instances
        self.priors = priors

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """The batch of these places in the epoch."""
        sets = [self.instances] if self.priors is None else [self.instances, self.priors]
        samples: list[Any] = []
        for images in sets:
            samples += [images.sample(i % len(images), images.draw(generator)) for i in chosen]
        is_prior = torch.arange(len(samples)) >= len(chosen)
        return {**default_collate(samples), "prior": is_prior}
