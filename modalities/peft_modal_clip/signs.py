"""Generated neon signs: the classes that the nano CLIP knows, in looks that it has never seen.

A batch is a dict: `image` (B, 3, S, S) float32, normalised, and `label` (B,) int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from peft_modal.data.cache import cached_tensors
from peft_modal.data.drawn import COLOURS, SHAPES, object_name
from peft_modal.data.drawn.concepts import paint_style
from peft_modal.data.drawn.distances import coverage, paint_, uniform
from peft_modal.data.drawn.scenes import object_distance, plan_scenes
from peft_modal.data.epochs import Batch
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData
from peft_modal.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from peft_modal_clip.data import Normalize, normalized
from peft_modal_vision.pictures import picture_batches

GENERATOR_VERSION = 1
"""Of the generated pictures; to be raised with every change that alters one."""
_BRIGHTEST = 0.8
"""Share of its full colour that the glass behind an outline has at most."""


class NeonSigns(SplitData):
    """Outlines of one of six shapes that glow in one of eight colours, 48 classes, few of each to train on.

    The glass within is more or less lit. To the nano CLIP the colours are plain and the shapes are not.

    Args:
        classes: Which classes there is training and validation data of: `all`, or the first half (`base`), for tests of
            what becomes of the other half.
        shots: Training pictures per class; more of them include the fewer.
        val_per_class: Validation pictures per class.
        test_per_class: Test pictures per class, of all classes; the same for all seeds.
        noise: Standard deviation of the noise on pictures in 0..1.
        side: Pixels.
        normalize: See `DrawnPairs`.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        seed: Of the training and validation pictures and of their order.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        classes: Literal["all", "base"] = "all",
        shots: PositiveInt = 16,
        val_per_class: PositiveInt = 4,
        test_per_class: PositiveInt = 20,
        noise: NonNegativeFloat = 0.1,
        side: PositiveInt = 32,
        normalize: Normalize = "half",
        batch_size: PositiveInt = 32,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.class_names = self.class_names_without_data({})
        self.classes: Literal["all", "base"] = classes
        self.per_class: dict[Part, int] = {"train": shots, "val": val_per_class, "test": test_per_class}
        self.noise = noise
        self.side = side
        self.normalize: Normalize = normalize

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """All pairs; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return tuple(object_name(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)))

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size and normalisation."""
        return {"side": self.side, "normalize": self.normalize}

    def load(self, part: Part) -> Signs:
        """The pictures of a split, from the cache if made before."""
        seed = 0 if part == "test" else self.seed
        count = len(self.class_names)
        if part != "test" and self.classes == "base":
            count = math.ceil(count / 2)

        def make() -> dict[str, Tensor]:
            rounds = [self._draw(seeded("neon signs", part, seed, shot)) for shot in range(self.per_class[part])]
            images = torch.cat([images[:count] for images in rounds])
            labels = torch.arange(count).repeat(len(rounds))
            return {"image": (images * 255).round().to(torch.uint8), "label": labels}

        key = {
            "generator": GENERATOR_VERSION, "part": part, "seed": seed, "per_class": self.per_class[part],
            "classes": count, "noise": self.noise, "side": self.side,
        }  # fmt: skip
        tensors = cached_tensors("neon signs", key, make)
        return Signs(tensors["image"], tensors["label"], self.normalize)

    def augment(self, batch: Batch, generator: Generator) -> Batch:
        """Mirrored or not: no class differs from its mirror image."""
        is_mirrored = torch.rand(len(batch["image"]), 1, 1, 1, generator=generator) < 0.5
        return {**batch, "image": torch.where(is_mirrored, batch["image"].flip(-1), batch["image"])}

    def predict_items(self, path: str | Path) -> tuple[Sequence[Path], Iterable[Batch]]:
        """The pictures under a path, and batches of them in the same order.

        Raises:
            DataError: There is no such file. A damaged one is reported when its batch is read.
        """
        return picture_batches(
            path, self.side, "fit", self.normalize, batch_size=2 * self.batch_size, num_workers=self.num_workers
        )

    def _draw(self, generator: Generator) -> Tensor:
        """A picture of every class."""
        label = torch.arange(len(self.class_names))
        scenes = plan_scenes(
            len(label), generator, pairs="all", objects=1, colour=label // len(SHAPES), shape=label % len(SHAPES)
        )
        images = paint_style(scenes, self.side)
        light = uniform(0.0, _BRIGHTEST, len(label), 1, 1, generator=generator)
        paint_(images, light * coverage(object_distance(scenes, 0, self.side)), scenes.rgb[:, 0, :, None, None])
        return (images + self.noise * torch.randn(images.shape, generator=generator)).clamp_(0, 1)


class Signs(Dataset[Batch]):
    """Pictures (n, 3, S, S) uint8 with labels (n,)."""

    def __init__(self, images: Tensor, labels: Tensor, normalize: Normalize) -> None:
        self.images = images
        self.labels = labels
        self.normalize: Normalize = normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        image = self.images[index].float() / 255
        return {"image": normalized(image[None], self.normalize)[0], "label": self.labels[index]}
