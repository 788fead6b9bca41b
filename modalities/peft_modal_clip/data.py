"""Generated pictures with captions as pairs to contrast.

A batch is a dict: `image` (B, 3, S, S) float32, normalised, `caption`, B texts, and for evaluation `label` (B,) int64
and `held_out` (B,) bool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_modal.data.drawn import COLOURS, GROUNDS, PATTERNS, SHAPES, draw_scenes, object_name, pair_mask
from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData, require_positive
from peft_modal.errors import ConfigError
from peft_modal.ranges import NonNegativeInt, PositiveInt
from peft_modal_vision.transforms import NORMS

Normalize = Literal["half", "clip"]


def normalized(images: Tensor, normalize: Normalize) -> Tensor:
    """Pictures (B, 3, S, S) in 0..1 as the network wants them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMS[normalize])
    return (images - mean) / std


class DrawnPairs(SplitData):
    """Scenes of one or two objects with captions, drawn anew for every batch; nothing is stored.

    Eight of the 48 pairs of colour and shape are never drawn for training. Evaluation shows one object a picture,
    every pair equally often on any background, and asks which of the 48 it is.

    Args:
        batch_size: Pictures per training batch; evaluation takes twice as many.
        batches: Training batches per epoch.
        val_per_pair: Validation pictures of each pair.
        test_per_pair: Test pictures of each pair; the same for all seeds.
        side: Pixels.
        normalize: Mean and deviation of the channels: 0.5 each (`half`, the nano's), or those of CLIP's pictures.
        grouped: Draw every third batch on one background, and every third with one colour of the first object besides:
            colours and backgrounds tell its pictures apart no longer, so shapes have to.
        seed: Of training and validation pictures.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    class_names: tuple[str, ...]

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 128,
        batches: PositiveInt = 250,
        val_per_pair: PositiveInt = 10,
        test_per_pair: PositiveInt = 40,
        side: PositiveInt = 32,
        normalize: Normalize = "half",
        grouped: bool = True,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(batches=batches, val_per_pair=val_per_pair, test_per_pair=test_per_pair, side=side)
        if normalize not in get_args(Normalize):
            raise ConfigError(f"normalize is '{normalize}', expected 'half' or 'clip'.")
        self.batches = batches
        self.per_pair: dict[Part, int] = {"val": val_per_pair, "test": test_per_pair}
        self.side = side
        self.normalize: Normalize = normalize
        self.grouped = grouped
        self.class_names = self.class_names_without_data({})

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """All pairs; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return tuple(object_name(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)))

    @property
    def preprocessing(self) -> dict[str, object]:
        """What has to be done to a new picture before the network sees it."""
        return {"side": self.side, "normalize": self.normalize}

    def load(self, part: Part) -> range | PairSet:
        """The pictures of validation or test; for training only how many there are."""
        if part == "train":
            return range(self.batches * self.batch_size)
        generator = seeded("drawn pairs", part, 0 if part == "test" else self.seed)
        return draw_pairs(self.per_pair[part], generator, side=self.side, normalize=self.normalize)

    def train_source(self, samples: range) -> BatchSource:
        """Batches that are drawn when they are asked for."""
        return PairBatches(
            len(samples) // self.batch_size,
            self.batch_size,
            side=self.side,
            normalize=self.normalize,
            grouped=self.grouped,
            seed=self.seed,
        )


class PairBatches:
    """The `BatchSource` of training; see `DrawnPairs` for the arguments."""

    def __init__(
        self, num_batches: int, batch_size: int, *, side: int, normalize: Normalize, grouped: bool, seed: int
    ) -> None:
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.side = side
        self.normalize: Normalize = normalize
        self.grouped = grouped
        self.seed = seed

    def __len__(self) -> int:
        return self.num_batches

    def batch(self, epoch: int, index: int) -> dict[str, Any]:
        """Batch `index` of an epoch; see `BatchSource`."""
        generator = seeded("drawn pairs", "train", self.seed, epoch, index)
        kind = (epoch * self.num_batches + index) % 3 if self.grouped else 0
        pattern, ground, colour = (
            int(torch.randint(len(names), (), generator=generator)) if kind >= least else None
            for least, names in ((1, PATTERNS), (1, GROUNDS), (2, COLOURS))
        )
        drawn = draw_scenes(self.batch_size, generator, side=self.side, colour=colour, pattern=pattern, ground=ground)
        return {"image": normalized(drawn.images, self.normalize), "caption": list(drawn.captions)}


class PairSet(Dataset[Batch]):
    """Pictures of one object each, for evaluation."""

    def __init__(self, images: Tensor, captions: tuple[str, ...], labels: Tensor, held_out: Tensor) -> None:
        self.images = images
        self.captions = captions
        self.labels = labels
        self.held_out = held_out

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index],
            "caption": self.captions[index],
            "label": self.labels[index],
            "held_out": self.held_out[index],
        }


def draw_pairs(per_pair: int, generator: torch.Generator, *, side: int, normalize: Normalize) -> PairSet:
    """As many pictures of each pair, in random order."""
    labels = torch.arange(len(COLOURS) * len(SHAPES)).repeat(per_pair)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    colour, shape = labels // len(SHAPES), labels % len(SHAPES)
    drawn = draw_scenes(len(labels), generator, side=side, pairs="all", objects=1, colour=colour, shape=shape)
    return PairSet(normalized(drawn.images, normalize), drawn.captions, labels, pair_mask("held_out")[colour, shape])
