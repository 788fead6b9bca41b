"""What data modules of pictures share: pictures in files and in memory, and a base for those that read files.

A batch is a dict: `image` (B, 3, S, S) float32, normalised by `mean` and `deviation` (B, 3), `label` (B,) int64.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.folder import FolderIndex, Item, list_files
from peft_modal.data.images import SUFFIXES, read_image
from peft_modal.data.splits import PARTS, Part, ShuffledBatches, SplitData
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_vision.mixing import mixed
from peft_modal_vision.transforms import (
    CROP_SCALE,
    Augmentation,
    Normalize,
    Resize,
    TrainingView,
    evaluation_view,
    normalized,
)


class PictureData(SplitData):
    """Base of data modules that read pictures of classes from files; a subclass says which, in `find`.

    Its constructor names what is its own and hands the rest on as `**options`.

    Args:
        root: What is read.
        resize: `square` ignores the ratio of a picture's sides (VTAB-1k); `crop` cuts the middle out (FGVC).
        augment: What changes training pictures at random: `flip`, `crop`, `resized_crop`, `colour`, `erase`; `mixup`
            and `cutmix` mix them in pairs, labels included.
        crop_scale: Least and largest share of a picture's area for `resized_crop`.
        resolution: Side in pixels of what the network sees.
        normalize: Mean and deviation of the channels: 0.5 each (`half`), ImageNet's, CLIP's, or left in 0..1
            (`none`). It has to be what the weights were trained with.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        drop_last: Drop the last batch of an epoch where it has fewer pictures.
        seed: Of order and augmentation.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        resize: Resize,
        augment: Sequence[Augmentation],
        crop_scale: tuple[Share, Share] = CROP_SCALE,
        resolution: PositiveInt = 224,
        normalize: Normalize = "imagenet",
        batch_size: PositiveInt = 64,
        drop_last: bool = True,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root = Path(root)
        self.resolution = resolution
        self.resize: Resize = resize
        self.normalize: Normalize = normalize
        self.kinds = tuple(augment)
        self.view = TrainingView(resolution, resize, augment, crop_scale)
        self.drop_last = drop_last
        self._index: FolderIndex | None = None

    @abstractmethod
    def find(self) -> FolderIndex:
        """The files of the three splits; called once."""

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size, how it comes about, and normalisation."""
        return {"resolution": self.resolution, "resize": self.resize, "normalize": self.normalize}

    def setup(self, stage: str | None = None) -> None:
        """Find the files.

        Raises:
            DataError: They cannot serve.
        """
        if self._index is None and PARTS[stage]:
            self._index = self.find()
            self.class_names = self._index.class_names
        super().setup(stage)

    def load(self, part: Part) -> PictureFiles:
        """The files of a split; each is read when it is needed."""
        assert self._index is not None
        items = {"train": self._index.train, "val": self._index.val, "test": self._index.test}[part]
        return PictureFiles(items, self.resolution, self.resize, self.normalize)

    def class_counts(self) -> list[int]:
        """Training pictures of each class; see `CountsClasses`."""
        labels = torch.tensor([item.label for item in self._sets["train"].items])
        return torch.bincount(labels, minlength=self.num_classes).tolist()

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 — what `load` returned
        """Shuffled batches, each picture read and changed anew."""
        return _AugmentedFiles(
            samples, self.batch_size, self.view, self.kinds, seed=self.seed, drop_last=self.drop_last
        )

    def predict_items(self, path: str | Path) -> tuple[Sequence[str | Path], Iterable[Batch]]:
        """The files under a path, and batches of them in the same order.

        Raises:
            DataError: There is no such file. A damaged one is reported when its batch is read.
        """
        return picture_batches(
            path, self.resolution, self.resize, self.normalize, batch_size=2 * self.batch_size,
            num_workers=self.num_workers,
        )  # fmt: skip


def picture_batches(
    path: str | Path, side: int, resize: Resize, normalize: str, *, batch_size: int, num_workers: int
) -> tuple[Sequence[Path], Iterable[Batch]]:
    """The pictures under a path, and batches of them without labels in the same order.

    Raises:
        DataError: There is no such file. A damaged one is reported when its batch is read.
    """
    files = list_files(path, SUFFIXES)
    dataset = PictureFiles(tuple(Item(file, 0) for file in files), side, resize, normalize, labelled=False)
    return files, DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)


class LabelledPictures(Dataset[Batch]):
    """Pictures in memory.

    Args:
        images: (n, 3, S, S) uint8.
        labels: (n,).
        normalize: See `NORMS`.
    """

    def __init__(self, images: Tensor, labels: Tensor, normalize: str) -> None:
        self.images = images
        self.labels = labels
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        one = normalized(self.images[index : index + 1].float() / 255, self.normalize)
        return {**{name: value[0] for name, value in one.items()}, "label": self.labels[index]}


class PictureFiles(Dataset[Batch]):
    """Pictures on disk.

    Args:
        items: Files and labels.
        resolution: Side in pixels.
        resize: See `evaluation_view`.
        normalize: See `normalized`.
        labelled: Whether the labels mean anything.
    """

    def __init__(
        self, items: Sequence[Item], resolution: int, resize: Resize, normalize: str, *, labelled: bool = True
    ) -> None:
        self.items = items
        self.resolution = resolution
        self.resize: Resize = resize
        self.normalize = normalize
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        item = self.items[index]
        return self.sample(item, evaluation_view(read_image(item.path), self.resolution, self.resize))

    def sample(self, item: Item, pixels: Tensor) -> Batch:
        """One sample of a file's square (3, S, S) in 0..1."""
        one = {name: value[0] for name, value in normalized(pixels[None], self.normalize).items()}
        return {**one, "label": torch.tensor(item.label)} if self.labelled else one


class _AugmentedFiles(ShuffledBatches):
    def __init__(
        self, samples: PictureFiles, batch_size: int, view: TrainingView, kinds: Sequence[str], *, seed: int,
        drop_last: bool,
    ) -> None:  # fmt: skip
        super().__init__(samples, batch_size, seed=seed, drop_last=drop_last)
        self.files = samples
        self.view = view
        self.kinds = kinds

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        items = [self.files.items[i] for i in chosen]
        batch: Batch = default_collate(
            [self.files.sample(item, self.view(read_image(item.path), generator)) for item in items]
        )
        return mixed(batch, self.kinds, generator)
