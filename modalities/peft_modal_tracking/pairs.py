"""Training pairs: a template and a search picture of one target, cut out, jittered and changed at random.

Lin et al., ECCV 2024, arXiv:2403.05231, appendix; the authors' released recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional

from peft_modal.data.epochs import Batch
from peft_modal.data.seeding import seeded
from peft_modal.errors import DataError
from peft_modal_tracking.boxes import areas, clipped, to_corners
from peft_modal_tracking.crops import CropMap, channel_means, crop, crop_map
from peft_modal_tracking.sequences import Video
from peft_modal_tracking.steps import CropSettings, normalised

_DRAWS: Final = 12
"""Jittered crops that are tried for one pair."""
_PAIRS: Final = 25
"""Pairs that are tried before the data is called unusable."""


@dataclass(frozen=True)
class Jitter:
    """How far a training search picture strays from the target."""

    scale: float = 0.25
    """Deviation of the logarithm of the scale, of x and y apart."""
    shift: float = 3.0
    """Largest shift in mean sides of the box."""
    min_visible: float = 10.0
    """Least width and height of the target inside the crop, in its pixels."""


@dataclass(frozen=True)
class Recolouring:
    """How training pictures are changed: mirrored, recoloured, and one of grey, solarised or blurred."""

    max_blur: float = 2.0
    """Largest radius in pixels."""


@dataclass(frozen=True)
class Group:
    """Sequences that are drawn from with a weight, such as one data set of several."""

    videos: Sequence[Video]
    weight: float = 1.0


class PairBatches:
    """The `BatchSource` of training pairs.

    A group is drawn by its weight, a sequence of it without replacement as long as there is one left, a frame that
    shows the target, and a second one within `max_gap` frames that does, too, where there is one.

    Args:
        groups: What is drawn from.
        settings: Of the crops.
        pairs: Per epoch.
        batch_size: Pairs per batch.
        jitter: Of the search picture.
        max_gap: Most frames between the two.
        recolouring: How both pictures are changed; None leaves them.
        seed: Of everything.

    Raises:
        DataError: No frame shows its target.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        settings: CropSettings,
        *,
        pairs: int,
        batch_size: int,
        jitter: Jitter,
        max_gap: int,
        recolouring: Recolouring | None,
        seed: int,
    ) -> None:
        self.settings = settings
        self.pairs = pairs
        self.batch_size = batch_size
        self.jitter = jitter
        self.max_gap = max_gap
        self.recolouring = recolouring
        self.seed = seed
        kept = [(Group([v for v in group.videos if len(v.usable())], group.weight)) for group in groups]
        self.groups = [group for group in kept if group.videos]
        if not self.groups:
            raise DataError("no frame of the training sequences shows its target, so there is no pair to train on")

    def __len__(self) -> int:
        return max(1, self.pairs // self.batch_size)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch; see `BatchSource`."""
        weights = torch.tensor([group.weight for group in self.groups])
        # Drawn for the whole epoch at once, so that sequences come without replacement.
        order = seeded("pairs", self.seed, epoch)
        drawn = torch.multinomial(weights, len(self) * self.batch_size, replacement=True, generator=order)
        places = _without_replacement(drawn, [len(group.videos) for group in self.groups], order)
        generator = seeded("pair", self.seed, epoch, index)
        chosen = range(index * self.batch_size, (index + 1) * self.batch_size)
        made = [self._pair(self.groups[int(drawn[i])].videos, int(places[i]), generator) for i in chosen]
        return {name: torch.stack([pair[name] for pair in made]) for name in made[0]}

    def _pair(self, videos: Sequence[Video], place: int, generator: Generator) -> Batch:
        for _ in range(_PAIRS):
            video = videos[place]
            first, second = draw_frames(video, self.max_gap, generator)
            made = make_pair(video, first, second, self.settings, self.jitter, generator, self.recolouring)
            if made is not None:
                return made
            place = int(torch.randint(len(videos), (), generator=generator))
        raise DataError(
            f"in {_PAIRS} pairs no target was {self.jitter.min_visible:g} pixels wide and high in its search picture; "
            "lower data.min_visible"
        )


def draw_frames(video: Video, max_gap: int, generator: Generator) -> tuple[int, int]:
    """A frame that shows the target, and another at most `max_gap` away, or the same where there is no other."""
    usable = video.usable()
    first = int(usable[torch.randint(len(usable), (), generator=generator)])
    near = usable[((usable - first).abs() <= max_gap) & (usable != first)]
    if not len(near):
        return first, first
    return first, int(near[torch.randint(len(near), (), generator=generator)])


def make_pair(
    video: Video,
    first: int,
    second: int,
    settings: CropSettings,
    jitter: Jitter | None,
    generator: Generator,
    recolouring: Recolouring | None = None,
) -> Batch | None:
    """Template and search picture with the target's box in each; None where too little of it is inside.

    Args:
        video: The sequence.
        first: Frame of the template.
        second: Frame of the search picture.
        settings: Of the crops.
        jitter: Of the search picture; None for its middle.
        generator: Of everything random.
        recolouring: How both pictures are changed; None leaves them.
    """
    images = [video.frames[first], video.frames[second]]
    boxes = [
        clipped(to_corners(video.boxes[i]), (image.shape[-2], image.shape[-1]))
        for i, image in zip((first, second), images, strict=True)
    ]
    if not bool((areas(torch.stack(boxes)) > 0).all()):
        return None
    wanted = crop_map(boxes[0], settings.template_size, settings.template_factor)
    template, there = crop(images[0], wanted, settings.template_size, channel_means(images[0]))
    template_box = there.to_crop(boxes[0])
    looked = search_map(boxes[1], settings, jitter, generator)
    if looked is None:
        return None
    search, there = crop(images[1], looked, settings.search_size, channel_means(images[1]))
    target = there.to_crop(boxes[1])
    template, search = template / 255, search / 255
    if recolouring is not None:
        template, template_box = _mirrored(template, template_box, generator)
        search, target = _mirrored(search, target, generator)
        change = _one_change(generator, recolouring.max_blur)
        template, search = (change(_recoloured(picture, generator)) for picture in (template, search))
    return {
        "template": normalised(template * 255, settings.normalize),
        "search": normalised(search * 255, settings.normalize),
        "template_box": template_box,
        "target": target,
    }


def search_map(box: Tensor, settings: CropSettings, jitter: Jitter | None, generator: Generator) -> CropMap | None:
    """Where a training search picture is cut out, or None where no draw showed enough of the box.

    The scales of x and y are divided by exp(scale * N(0, 1)); then the crop is shifted by up to `shift` mean sides of
    the box, as large as it is in the crop.
    """
    plain = crop_map(box, settings.search_size, settings.search_factor)
    if jitter is None:
        return plain
    height, width = settings.search_size
    middle = torch.tensor([width / 2, height / 2])
    for _ in range(_DRAWS):
        scale = plain.scale / torch.exp(jitter.scale * torch.randn(2, generator=generator))
        sides = (box[2:] - box[:2]) * scale
        shift = (torch.rand(2, generator=generator) * 2 - 1) * jitter.shift * sides.mean()
        found = CropMap(scale, middle - (box[:2] + box[2:]) / 2 * scale + shift)
        inside = clipped(found.to_crop(box), settings.search_size)
        if bool((inside[2:] - inside[:2] >= jitter.min_visible).all()):
            return found
    return None


def _without_replacement(drawn: Tensor, sizes: Sequence[int], generator: Generator) -> Tensor:
    """For each draw of a group the number of a sequence; one comes again only when all others have come."""
    places = torch.zeros_like(drawn)
    for group, size in enumerate(sizes):
        mine = (drawn == group).nonzero()[:, 0]
        rounds = [torch.randperm(size, generator=generator) for _ in range(math.ceil(len(mine) / size))]
        if rounds:
            places[mine] = torch.cat(rounds)[: len(mine)]
    return places


def _mirrored(picture: Tensor, box: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Half of the time."""
    if float(torch.rand((), generator=generator)) >= 0.5:
        return picture, box
    width = picture.shape[-1]
    return picture.flip(-1), torch.stack([width - box[2], box[1], width - box[0], box[3]])


def _recoloured(picture: Tensor, generator: Generator) -> Tensor:
    """Brightness, contrast and saturation by factors of 0.6 to 1.4, in random order."""
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    factors = (torch.rand(3, generator=generator) * 0.8 + 0.6).tolist()
    for which in torch.randperm(3, generator=generator).tolist():
        picture = changes[which](picture, factors[which])
    return picture


def _one_change(generator: Generator, max_blur: float) -> Callable[[Tensor], Tensor]:
    """Grey, solarised from 128 on, or blurred with a radius from 0.1 on: one for both pictures, in 8 bits."""
    which = int(torch.randint(3, (), generator=generator))
    radius = float(torch.rand((), generator=generator)) * (max_blur - 0.1) + 0.1

    def change(picture: Tensor) -> Tensor:
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
        if which == 0:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        elif which == 1:
            pixels = functional.solarize(pixels, 128)
        else:
            side = 2 * math.ceil(3 * radius) + 1
            # Reflection needs a picture larger than half of the kernel.
            side = min(side, 2 * (min(pixels.shape[-2:]) - 1) + 1)
            pixels = functional.gaussian_blur(pixels, [side, side], [radius, radius])
        return pixels.to(torch.float32) / 255

    return change
