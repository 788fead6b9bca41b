"""Data modules for segmentation: generated scenes, and pictures with masks in the layouts of the field.

A batch is a dict: `image` (B, 3, H, W) float32, normalised by `mean` and `deviation`, and `mask` (B, H, W) int64, in
which 255 is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.folder import files_below, list_files
from peft_modal.data.images import SUFFIXES, read_image
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import PARTS, Part, ShuffledBatches, SplitData
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, PositiveInt
from peft_modal_vision.data import GENERATOR_VERSION
from peft_modal_vision.palette import IGNORED
from peft_modal_vision.patterns import SCENE_CLASSES, draw_masked_scenes
from peft_modal_vision.transforms import Normalize, normalized

Layout = Literal["pairs", "ade20k", "voc"]
_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
_ADE20K_CLASSES = 150


class Scenes(SplitData):
    """Generated scenes: three textured grounds and eight kinds of things, in bad light.

    Args:
        count: Training pictures.
        val_count: Validation pictures.
        test_count: Test pictures; the same for all seeds.
        resolution: Sides in pixels.
        normalize: See `Patterns`.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        seed: Of the training and validation pictures and of their order.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        count: PositiveInt = 256,
        val_count: PositiveInt = 64,
        test_count: PositiveInt = 256,
        resolution: PositiveInt = 64,
        normalize: Normalize = "half",
        batch_size: PositiveInt = 16,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.counts: dict[Part, int] = {"train": count, "val": val_count, "test": test_count}
        self.resolution = resolution
        self.normalize: Normalize = normalize
        self.class_names = SCENE_CLASSES

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Grounds and things; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return SCENE_CLASSES

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size and normalisation."""
        return {"resolution": self.resolution, "normalize": self.normalize}

    def load(self, part: Part) -> MaskedPictures:
        """The pictures of a split, from the cache if made before."""
        seed = 0 if part == "test" else self.seed

        def make() -> dict[str, Tensor]:
            generator = seeded("scenes", part, seed)
            pictures, masks = draw_masked_scenes(self.counts[part], generator, side=self.resolution)
            return {"image": (pictures * 255).round().to(torch.uint8), "mask": masks.to(torch.uint8)}

        key = {
            "generator": GENERATOR_VERSION, "part": part, "seed": seed, "count": self.counts[part],
            "resolution": self.resolution,
        }  # fmt: skip
        tensors = cached_tensors("scenes", key, make)
        return MaskedPictures(tensors["image"], tensors["mask"], self.normalize)

    def augment(self, batch: Batch, generator: Generator) -> Batch:
        """Mirrored or not, picture and mask together."""
        is_mirrored = torch.rand(len(batch["image"]), generator=generator) < 0.5
        return {
            **batch,
            "image": torch.where(is_mirrored[:, None, None, None], batch["image"].flip(-1), batch["image"]),
            "mask": torch.where(is_mirrored[:, None, None], batch["mask"].flip(-1), batch["mask"]),
        }


class MaskedPictures(Dataset[Batch]):
    """Pictures and masks in memory.

    Args:
        images: (n, 3, S, S) uint8.
        masks: (n, S, S) uint8.
        normalize: See `normalized`.
    """

    def __init__(self, images: Tensor, masks: Tensor, normalize: str) -> None:
        self.images = images
        self.masks = masks
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        one = normalized(self.images[index : index + 1].float() / 255, self.normalize)
        return {**{name: value[0] for name, value in one.items()}, "mask": self.masks[index].long()}


class Masks(SplitData):
    """Pictures with a mask each, in one of three layouts.

    `pairs`: `DIR/images/{train,val,test}/NAME.*` and `DIR/masks/{train,val,test}/NAME.png`. `ade20k`:
    `DIR/images/{training,validation}` and `DIR/annotations/{training,validation}`, label 0 ignored. `voc`:
    `DIR/JPEGImages`, `DIR/SegmentationClass` and the lists `DIR/ImageSets/Segmentation/{train,val,test}.txt`. Where
    there is no test split, validation pictures are tested on. Masks are PNGs whose values are the labels, palettes
    included; 255 is ignored.

    Args:
        root: The folder.
        layout: Which.
        classes: Names of the classes in label order; None for those of `ade20k` (numbered) and `voc`.
        resolution: Side in pixels of training crops, and of the shorter side in evaluation.
        scales: Range of the random scale of training pictures before the crop.
        normalize: See `Folder`.
        batch_size: Pictures per training batch; evaluation takes one at a time.
        seed: Of order and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: No classes are named for layout `pairs`, or the scales are out of order.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        layout: Layout = "pairs",
        classes: list[str] | None = None,
        resolution: PositiveInt = 512,
        scales: tuple[float, float] = (0.5, 2.0),
        normalize: Normalize = "imagenet",
        batch_size: PositiveInt = 8,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if not 0 < scales[0] <= scales[1]:
            raise ConfigError(f"data.scales: {list(scales)} are no range of positive numbers")
        if layout == "pairs" and not classes:
            raise ConfigError("data.classes: name the classes in the order of their labels in the masks")
        self.root = Path(root)
        self.layout: Layout = layout
        self.resolution = resolution
        self.scales = scales
        self.normalize: Normalize = normalize
        numbered = tuple(f"class {i + 1}" for i in range(_ADE20K_CLASSES))
        self.class_names = tuple(classes) if classes else (_VOC if layout == "voc" else numbered)

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size and normalisation."""
        return {"resolution": self.resolution, "normalize": self.normalize}

    def setup(self, stage: str | None = None) -> None:
        """Find the files.

        Raises:
            DataError: The folder is not of this layout.
        """
        if PARTS[stage] and not self.root.is_dir():
            raise DataError(f"'{self.root}' is not a folder.")
        super().setup(stage)

    def load(self, part: Part) -> MaskedFiles:
        """The files of a split.

        Raises:
            DataError: There is no training picture, or a picture has no mask.
        """
        pairs = find_pairs(self.root, self.layout, part)
        if not pairs and part == "test":
            pairs = find_pairs(self.root, self.layout, "val")
        if not pairs and part == "train":
            raise DataError(f"'{self.root}' has no training pictures in the layout '{self.layout}'.")
        return MaskedFiles(pairs, self)

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 — what `load` returned
        """Shuffled batches of random crops."""
        return _Crops(samples, self.batch_size, seed=self.seed)

    def groups(self, samples: Any) -> Sequence[int]:  # noqa: ANN401 — what `load` returned
        """Every picture has a shape of its own."""
        return range(len(samples))

    def predict_items(self, path: str | Path) -> tuple[Sequence[str | Path], Iterable[Batch]]:
        """The files under a path, and batches of one picture each in the same order."""
        files = list_files(path, SUFFIXES)
        dataset = MaskedFiles([(file, None) for file in files], self)
        return files, DataLoader(dataset, batch_size=1, num_workers=self.num_workers)


def find_pairs(root: Path, layout: Layout, part: Part) -> list[tuple[Path, Path | None]]:
    """Pictures of a split with their masks, sorted by name.

    Raises:
        DataError: A picture has no mask, or a list names a file that is not there.
    """
    if layout == "voc":
        table = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        names = table.read_text(encoding="utf-8").split() if table.is_file() else []
        found = [(root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in sorted(names)]
    else:
        folder = {"train": "training", "val": "validation", "test": "testing"}[part] if layout == "ade20k" else part
        masks = root / ("annotations" if layout == "ade20k" else "masks") / folder
        images = root / "images" / folder
        files = files_below(images, SUFFIXES) if images.is_dir() else ()
        found = [(file, masks / file.relative_to(images).with_suffix(".png")) for file in files]
    for image, mask in found:
        for file in (image, mask):
            if not file.is_file():
                raise DataError(f"'{file}' does not exist; each picture needs a mask of its name.")
    return [(image, mask) for image, mask in found]


class MaskedFiles(Dataset[Batch]):
    """Pictures and masks on disk.

    Args:
        pairs: Picture, and mask or None.
        data: Whose sizes and classes.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path | None]], data: Masks) -> None:
        self.pairs = pairs
        self.data = data

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
        image, mask = self.read(index)
        side = [self.data.resolution]
        image = functional.resize(image, side, interpolation=InterpolationMode.BICUBIC)
        return self.sample(image, mask)

    def read(self, index: int) -> tuple[Image.Image, Tensor | None]:
        """Picture and mask (H, W) of one size.

        Raises:
            DataError: A file cannot be read, the mask has another size, or a label that no class has.
        """
        path, mask_path = self.pairs[index]
        image = read_image(path)
        if mask_path is None:
            return image, None
        mask = read_mask(mask_path)
        if self.data.layout == "ade20k":
            mask = torch.where(mask == 0, IGNORED, mask - 1)
        if mask.shape != (image.height, image.width):
            raise DataError(
                f"'{mask_path}' is {mask.shape[1]} x {mask.shape[0]} pixels, its picture {image.width} x {image.height}"
            )
        known = mask[mask != IGNORED]
        if known.numel() and int(known.max()) >= self.data.num_classes:
            raise DataError(
                f"'{mask_path}' has the label {int(known.max())}, and there are {self.data.num_classes} classes"
            )
        return image, mask

    def sample(self, image: Image.Image, mask: Tensor | None) -> Batch:
        """One sample; the mask keeps its own size."""
        pixels: Tensor = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)
        one = normalized(pixels.as_subclass(Tensor)[None], self.data.normalize)
        out = {name: value[0] for name, value in one.items()}
        return out if mask is None else {**out, "mask": mask.long()}


def read_mask(path: Path) -> Tensor:
    """The labels of a mask file, (H, W) int64.

    Raises:
        DataError: It cannot be read, or its pixels are colours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            values = np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a mask: {error}") from error
    if values.ndim != 2:
        raise DataError(f"'{path}' holds colours, not labels; save the mask as one channel, or with a palette.")
    return torch.from_numpy(values.astype(np.int64))


class _Crops(ShuffledBatches):
    def __init__(self, samples: MaskedFiles, batch_size: int, *, seed: int) -> None:
        super().__init__(samples, batch_size, seed=seed)
        self.files = samples

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        batch: Batch = default_collate([self._crop(index, generator) for index in chosen])
        return batch

    def _crop(self, index: int, generator: Generator) -> Batch:
        """A random scale, then a square out of it, filled up with black and ignored pixels; mirrored or not."""
        image, mask = self.files.read(index)
        assert mask is not None
        side, (low, high) = self.files.data.resolution, self.files.data.scales
        draws = torch.rand(4, generator=generator).tolist()
        scale = (low + (high - low) * draws[0]) * side / min(image.height, image.width)
        size = [max(1, round(image.height * scale)), max(1, round(image.width * scale))]
        image = functional.resize(image, size, interpolation=InterpolationMode.BICUBIC)
        labels = functional.resize(mask[None].to(torch.uint8), size, interpolation=InterpolationMode.NEAREST)[0]
        top, left = (int(d * (max(0, s - side) + 1)) for d, s in zip(draws[1:3], size, strict=True))
        image = image.crop((left, top, left + side, top + side))
        cut = labels[top : top + side, left : left + side]
        filled = torch.full((side, side), IGNORED, dtype=torch.int64)
        filled[: cut.shape[0], : cut.shape[1]] = cut
        batch = self.files.sample(image, filled)
        if draws[3] < 0.5:
            batch = {**batch, "image": batch["image"].flip(-1), "mask": batch["mask"].flip(-1)}
        return batch
