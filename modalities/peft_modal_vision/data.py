"""Data modules for pictures: generated patterns, and files in folders.

Their batches are those of `peft_modal_vision.pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch, BatchSource, DrawnBatches
from peft_modal.data.folder import FolderIndex, scan_folder
from peft_modal.data.images import SUFFIXES
from peft_modal.data.seeding import seeded
from peft_modal.data.shots import draw_per_class
from peft_modal.data.splits import Part, SplitData
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_vision.patterns import DOWNSTREAM, PRETRAIN, Vocabulary, draw_patterns
from peft_modal_vision.pictures import LabelledPictures, PictureData
from peft_modal_vision.transforms import Augmentation, Normalize, Resize, normalized

GENERATOR_VERSION = 1
"""Of the generated pictures; to be raised with every change that alters one."""


class Patterns(SplitData):
    """Generated pictures of one textured shape each; a class is a shape and a texture.

    `downstream` has 24 classes of eight shapes and three textures in bad light, with few training pictures and one test
    set for all seeds; it is kept in the cache folder. `pretrain` has 96 classes of other shapes and textures, drawn
    anew for every batch, so an epoch is a number of steps.

    Args:
        split: Which classes.
        shots: Training pictures per class (downstream).
        val_per_class: Validation pictures per class.
        test_per_class: Test pictures per class.
        steps: Batches per epoch (pretrain).
        resolution: Sides in pixels.
        normalize: Mean and deviation of the channels: 0.5 each (`half`, the nano's), ImageNet's, or left in 0..1.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        seed: Of the training and validation pictures and of their order. Not of the test pictures.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        split: Literal["downstream", "pretrain"] = "downstream",
        shots: PositiveInt = 16,
        val_per_class: PositiveInt = 8,
        test_per_class: PositiveInt = 40,
        steps: PositiveInt = 200,
        resolution: PositiveInt = 32,
        normalize: Normalize = "half",
        batch_size: PositiveInt = 32,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.split: Literal["downstream", "pretrain"] = split
        self.vocabulary: Vocabulary = DOWNSTREAM if split == "downstream" else PRETRAIN
        self.class_names = self.vocabulary.class_names
        self.steps = steps
        self.resolution = resolution
        self.normalize: Normalize = normalize
        self.per_class: dict[Part, int] = {"train": shots, "val": val_per_class, "test": test_per_class}

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The classes of a split; see `peft_modal.inspection.classes.NamesClasses`."""
        return (DOWNSTREAM if arguments["split"] == "downstream" else PRETRAIN).class_names

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size and normalisation."""
        return {"resolution": self.resolution, "normalize": self.normalize}

    def class_counts(self) -> list[int]:
        """Training pictures of each class; see `CountsClasses`."""
        return [self.per_class["train"]] * len(self.class_names)

    def load(self, part: Part) -> LabelledPictures:
        """The pictures of a split, from the cache if made before; of drawn training batches nothing is kept."""
        if self.split == "pretrain" and part == "train":
            return LabelledPictures(
                torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "none"
            )
        seed = 0 if part == "test" else self.seed
        count = self.per_class[part]

        def make() -> dict[str, Tensor]:
            labels = torch.arange(len(self.class_names)).repeat_interleave(count)
            generator = seeded("patterns", self.split, part, seed)
            pictures = draw_patterns(self.vocabulary, labels, generator, side=self.resolution)
            return {"image": (pictures * 255).round().to(torch.uint8), "label": labels}

        key = {
            "generator": GENERATOR_VERSION, "split": self.split, "part": part, "seed": seed, "per_class": count,
            "resolution": self.resolution,
        }  # fmt: skip
        tensors = cached_tensors("patterns", key, make)
        return LabelledPictures(tensors["image"], tensors["label"], self.normalize)

    def augment(self, batch: Batch, generator: Generator) -> Batch:
        """Mirrored or not."""
        is_mirrored = torch.rand(len(batch["image"]), 1, 1, 1, generator=generator) < 0.5
        return {**batch, "image": torch.where(is_mirrored, batch["image"].flip(-1), batch["image"])}

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 — what `load` returned
        """Batches drawn anew, or shuffled ones of a fixed set."""
        return DrawnBatches(self.draw, self.steps) if self.split == "pretrain" else super().train_source(samples)

    def draw(self, *key: int | str) -> Batch:
        """One batch of pre-training, by its key."""
        generator = seeded("patterns", self.split, self.seed, *key)
        labels = torch.randint(len(self.class_names), (self.batch_size,), generator=generator)
        pictures = draw_patterns(self.vocabulary, labels, generator, side=self.resolution)
        return {**normalized(pictures, self.normalize), "label": labels}


class Folder(PictureData):
    """Pictures in `DIR/{train,val,test}/<class>/...` or `DIR/<class>/...`, or those a CSV `path,label[,split]` names.

    Any file that Pillow reads, whatever its mode, depth and orientation; one that cannot be read ends the run with its
    name.

    Args:
        root: The folder or the CSV file.
        shots: Training pictures per class, drawn by the seed; more of them include the fewer. None takes all.
        resolution: Side in pixels of what the network sees.
        resize: `square` ignores the ratio of a picture's sides (VTAB-1k); `crop` cuts the middle out (FGVC); `fit`
            as much of it as there is (CLIP).
        augment: What changes training pictures at random: `flip`, `crop`, `resized_crop`, `colour`, `erase`; `mixup`
            and `cutmix` mix them in pairs, labels included.
        normalize: Mean and deviation of the channels: 0.5 each (`half`), ImageNet's, CLIP's, or left in 0..1
            (`none`). It has to be what the weights were trained with.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        seed: Of the held-out files, of `shots`, and of order and augmentation.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        shots: PositiveInt | None = None,
        resolution: PositiveInt = 224,
        resize: Resize = "square",
        augment: list[Augmentation] = ["flip"],  # noqa: B006 — never changed
        normalize: Normalize = "imagenet",
        batch_size: PositiveInt = 32,
        val_share: Share = 0.1,
        test_share: Share = 0.2,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            root=root, resolution=resolution, resize=resize, augment=augment, normalize=normalize,
            batch_size=batch_size, seed=seed, num_workers=num_workers,
        )  # fmt: skip
        self.shots = shots
        self.val_share = val_share
        self.test_share = test_share

    def find(self) -> FolderIndex:
        """The files of the folder or the CSV, held-out ones first, then the shots of what is left to train on."""
        index = scan_folder(
            self.root, suffixes=SUFFIXES, val_share=self.val_share, test_share=self.test_share, seed=self.seed
        )
        if self.shots is None:
            return index
        labels = [item.label for item in index.train]
        drawn = draw_per_class(
            labels, index.class_names, self.shots, seed=self.seed, where=f"'{self.root}'", asked="data.shots"
        )
        return replace(index, train=tuple(index.train[i] for chosen in drawn for i in chosen))

    def no_samples(self, part: Part) -> str:
        """Where files of a split come from."""
        return f"'{self.root}' has no {part} files: add '{part}/<class>/', or set a {part}_share."
