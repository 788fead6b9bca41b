"""Data modules for images with captions, and for pictures of one subject.

A batch is a dict: `pixels` (B, 3, H, W) float32 in [-1, 1] (or `latent_mean` and `latent_std`, once latents are
cached), `caption` and `key`, lists of B texts, `original_size`, `crop` and `target_size` (B, 2) int64; see `ImageSet`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from torch import Tensor
from torch.utils.data import Dataset

from peft_modal.data.captions import Captioned, CaptionIndex, scan_captions
from peft_modal.data.epochs import Batch
from peft_modal.data.folder import files_below, list_files
from peft_modal.data.images import SUFFIXES
from peft_modal.data.splits import PARTS, Part, SplitData, require_positive
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import NonNegativeInt, PositiveInt, Range, Share
from peft_modal_diffusion.latents import Encode, cache_latents
from peft_modal_diffusion.probes import Probe
from peft_modal_diffusion.samples import Choice, Crop, Framing, ImageSet, SubjectBatches, TrainBatches, look_at
from peft_modal_diffusion.transforms import Size, make_buckets

_MIN_STEP = 8
_CLASS_PROBES = 4
"""Pictures of the class that are drawn to see what a run has done to it."""


class Pictures(SplitData):
    """What the data modules of images share; a subclass says in `find` which images are in a split.

    Where no resolution is given, it is the network's: nothing is read before `suit` has told it.

    Args:
        resolution: Side of the square that the network is trained on, in pixels; None for the network's own.
        crop: Where the square is cut out of a training picture.
        flip: Mirror half of the training pictures.
        bucket_step: What the sides of other shapes than the square are multiples of; None for the square alone.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        repeats: How often an epoch shows each training picture.
        seed: Of order, crops, flips and captions.
        num_workers: Processes that read pictures.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
    """

    def __init__(
        self, *, resolution: int | None, crop: Crop, flip: bool, bucket_step: int | None = None, batch_size: int,
        repeats: int, seed: int, num_workers: int,
    ) -> None:  # fmt: skip
        given = {} if resolution is None else {"resolution": resolution}
        require_positive(batch_size=batch_size, repeats=repeats, **given)
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if crop not in {"centre", "random"}:
            raise ConfigError(f"crop is '{crop}', expected 'centre' or 'random'.")
        self.repeats = repeats
        self._asked: set[Part] = set()
        self._frame = partial(_framing, crop=crop, flip=flip, bucket_step=bucket_step)
        self._framing = None if resolution is None else self._frame(resolution)

    @property
    def framing(self) -> Framing:
        """How pictures are cut.

        Raises:
            ConfigError: No resolution is known yet.
        """
        if self._framing is None:
            raise ConfigError("data.resolution is null, which stands for the network's own, but no network was named")
        return self._framing

    @abstractmethod
    def find(self, part: Part) -> Sequence[Captioned]:
        """The images of a split.

        Raises:
            DataError: The folder or its captions cannot serve.
        """

    def load(self, part: Part) -> ImageSet:
        """Find the images of a split and read their headers.

        Raises:
            DataError: The folder, its captions or an image cannot serve.
        """
        return self.image_set(self.find(part), part)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that a stage needs; only look for their images while the resolution is not known."""
        if self._framing is not None:
            super().setup(stage)
            return
        self._asked.update(PARTS[stage])
        for part in PARTS[stage]:
            self.find(part)

    def suit(self, side: int) -> None:
        """Cut pictures to a network's own resolution, unless another was asked for.

        Args:
            side: In pixels.

        Raises:
            ConfigError: It is no multiple of the step of the buckets.
        """
        if self._framing is None:
            self._framing = self._frame(side)
            for part in PARTS[None]:
                if part in self._asked:
                    self._sets[part] = self.load(part)

    @property
    def preprocessing(self) -> dict[str, object]:
        """How pictures are cut, for whoever makes more of them."""
        return {"resolution": self.framing.resolution, "buckets": [list(size) for size in self.framing.buckets]}

    def image_sets(self) -> list[ImageSet]:
        """All pictures that are loaded, each set once."""
        return [self._sets[part] for part in self._sets]

    def captions(self) -> tuple[str, ...]:
        """Every caption that a batch of any split may hold, each once."""
        self.setup()
        texts = (text for images in self.image_sets() for picture in images.pictures for text in picture.captions)
        return tuple(dict.fromkeys(texts))

    def references(self, most: int) -> tuple[list[Tensor], list[str]]:
        """See `peft_modal_diffusion.probes.HasReferences`; pictures come from their files, whatever is cached."""
        self.setup("fit")
        images: ImageSet = self._sets["train"]
        chosen = range(0, len(images), max(1, self.repeats, -(-len(images) // most)))
        pictures = [images.pixels(index, Choice()) / 2 + 0.5 for index in chosen]
        return pictures, [images.pictures[index].captions[0] for index in chosen]

    def cache_latents(self, encode: Encode, *, encoder: str, dtype: str) -> None:
        """Encode all pictures now, those of every split; from now on batches hold latents instead of pixels.

        To be called before the first batch is read. See `peft_modal_diffusion.latents.cache_latents`.
        """
        self.setup()
        cache_latents(
            self.image_sets(), encode, encoder=encoder, dtype=dtype, batch_size=2 * self.batch_size,
            num_workers=self.num_workers,
        )  # fmt: skip

    def image_set(self, images: Sequence[Captioned], part: Part) -> ImageSet:
        """The samples of a split."""
        framing = self.framing if part == "train" else self.framing.fixed()
        return ImageSet(look_at(images, framing) * (self.repeats if part == "train" else 1), framing)

    def groups(self, samples: ImageSet) -> list[Size] | None:
        """The bucket of each picture, where there are buckets."""
        return [picture.target for picture in samples.pictures] if self.framing.buckets else None

    def evaluation_set(self, samples: ImageSet) -> Dataset[Batch]:
        """Pictures cut from the centre, with their first caption."""
        return samples


def _framing(resolution: int, *, crop: Crop, flip: bool, bucket_step: int | None) -> Framing:
    if bucket_step is not None and (bucket_step < _MIN_STEP or resolution % bucket_step):
        raise ConfigError(
            f"resolution is {resolution}, expected a multiple of bucket_step, which is {bucket_step} and must be "
            f"{_MIN_STEP} or more."
        )
    return Framing(resolution, crop, flip, make_buckets(resolution, bucket_step) if bucket_step else ())


class Folder(Pictures):
    """Your own images with captions, in `DIR/{train,val,test}/...` or all below `DIR`.

    Captions stand in a `metadata.jsonl`, in `NAME.txt` or `NAME.caption` beside each image, or are one for all; see
    `scan_captions`. Images are read as `peft_modal.data.images.read_image` says: upright, on white, of animations the
    first frame. The shorter side is resized to `resolution`, the rest cut off.

    Args:
        root: The folder.
        caption: One caption for all images, whatever stands beside them.
        caption_column: Key of the captions in `metadata.jsonl`.
        allow_empty: Take empty captions from files as they are; they teach the picture without words.
        resolution: Side of the square that the network is trained on, in pixels; null for the network's own.
        crop: Where the square is cut out of a training picture.
        flip: Mirror half of the training pictures left to right; not for faces, writing or captions with sides.
        buckets: Keep wide and tall pictures wide and tall: each goes to the nearest of the shapes of about
            `resolution`^2 pixels from 1:4 to 4:1, and a batch holds pictures of one shape.
        bucket_step: What the sides of these shapes are multiples of, in pixels.
        batch_size: Pictures per training batch; evaluation takes twice as many. The last batch of an epoch, or of a
            bucket, may be smaller.
        val_share: Share of the training images held out for validation where there is no `val`, rounded down: below
            20 images none by default.
        repeats: How often an epoch shows each training picture.
        seed: Of the images held out, and of order, crops, flips and the choice among several captions.
        num_workers: Processes that read pictures.

    Raises:
        ConfigError: A number is out of range, a name is unknown, or the resolution is no multiple of `bucket_step`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        caption: str | None = None,
        caption_column: str = "text",
        allow_empty: bool = False,
        resolution: PositiveInt | None = None,
        crop: Crop = "centre",
        flip: bool = False,
        buckets: bool = False,
        bucket_step: Annotated[int, Range(_MIN_STEP)] = 64,
        batch_size: PositiveInt = 4,
        val_share: Share = 0.05,
        repeats: PositiveInt = 1,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            resolution=resolution, crop=crop, flip=flip, bucket_step=bucket_step if buckets else None,
            batch_size=batch_size, repeats=repeats, seed=seed, num_workers=num_workers,
        )  # fmt: skip
        self.root = Path(root)
        self.caption = caption
        self.caption_column = caption_column
        self.allow_empty = allow_empty
        self.val_share = val_share
        self._index: CaptionIndex | None = None

    def find(self, part: Part) -> Sequence[Captioned]:
        """The images of a split, with their captions.

        Raises:
            DataError: The folder or its captions cannot serve.
        """
        if self._index is None:
            self._index = scan_captions(
                self.root, caption=self.caption, column=self.caption_column, allow_empty=self.allow_empty,
                val_share=self.val_share, seed=self.seed,
            )  # fmt: skip
        found: Sequence[Captioned] = getattr(self._index, part)
        return found

    def train_source(self, samples: ImageSet) -> TrainBatches:
        """Batches whose captions, flips and crops are chosen anew."""
        return TrainBatches(samples, self.batch_size, seed=self.seed, groups=self.groups(samples))


class Subject(Pictures):
    """A few pictures of one subject, and pictures of its class against forgetting (DreamBooth, arXiv:2208.12242).

    A training batch holds `batch_size` pictures of the subject and then as many of the class, told apart by `prior`
    (2B,) bool; an epoch is as long as the larger of the two sets. There is no validation: every picture counts.

    Args:
        root: Folder with the pictures of the subject.
        instance_prompt: Caption of all of them, with a rare word for the subject: `a photo of sks dog`.
        class_root: Folder with pictures of the class; without it none are mixed in.
        class_prompt: Caption of those, the same without the word: `a photo of dog`.
        num_class_images: How many pictures of the class there shall be; the task draws those that are missing.
        resolution: Side of the square that the network is trained on, in pixels; null for the network's own.
        crop: Where the square is cut out of a picture.
        flip: Mirror half of the pictures left to right.
        batch_size: Pictures of the subject per batch.
        repeats: How often an epoch shows each picture of the subject, at least.
        seed: Of order, crops and flips.
        num_workers: Processes that read pictures.

    Raises:
        ConfigError: A number is out of range, a prompt is empty, only one of `class_root` and `class_prompt` is given,
            or one of the folders lies in the other.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        instance_prompt: str,
        class_root: str | Path | None = None,
        class_prompt: str | None = None,
        num_class_images: PositiveInt = 100,
        resolution: PositiveInt | None = None,
        crop: Crop = "centre",
        flip: bool = False,
        batch_size: PositiveInt = 1,
        repeats: PositiveInt = 1,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            resolution=resolution, crop=crop, flip=flip, batch_size=batch_size, repeats=repeats, seed=seed,
            num_workers=num_workers,
        )  # fmt: skip
        if not instance_prompt.strip():
            raise ConfigError("data.instance_prompt is empty, expected words such as 'a photo of sks dog'.")
        if (class_root is None) != (not (class_prompt or "").strip()):
            raise ConfigError("data.class_root and data.class_prompt belong together: give both or neither.")
        if class_root is not None and _overlap(Path(root).resolve(), Path(class_root).resolve()):
            raise ConfigError(
                f"data.class_root '{class_root}' and data.root '{root}' hold the same files: both are searched with "
                "their subfolders, so neither may lie in the other."
            )
        self.root = Path(root)
        self.instance_prompt = instance_prompt
        self.class_root = None if class_root is None else Path(class_root)
        self.class_prompt = class_prompt
        self.num_class_images = num_class_images
        self._priors: ImageSet | None = None

    def find(self, part: Part) -> Sequence[Captioned]:
        """The pictures of the subject.

        Raises:
            DataError: There are none.
        """
        files = list_files(self.root, SUFFIXES) if part == "train" else ()
        return [Captioned(path, (self.instance_prompt,)) for path in files]

    def priors(self) -> ImageSet | None:
        """The pictures of the class, looked for at the first call: they may be made after `setup`.

        Raises:
            DataError: There are none, or one cannot serve.
        """
        if self._priors is None and self.class_root is not None:
            assert self.class_prompt is not None
            files = self.class_images()
            if not files:
                raise DataError(
                    f"'{self.class_root}' holds no pictures of the class: put some of '{self.class_prompt}' there, or "
                    "leave out data.class_root."
                )
            pictures = look_at([Captioned(path, (self.class_prompt,)) for path in files], self.framing)
            self._priors = ImageSet(pictures, self.framing)
        return self._priors

    def class_images(self) -> tuple[Path, ...]:
        """Files of the class that are there by now."""
        if self.class_root is None or not self.class_root.is_dir():
            return ()
        return files_below(self.class_root, SUFFIXES)

    def probes(self) -> tuple[Probe, ...]:
        """Whether the class is drawn as before."""
        return () if self.class_prompt is None else (Probe((self.class_prompt,) * _CLASS_PROBES, is_prior=True),)

    def image_sets(self) -> list[ImageSet]:
        """The pictures of the subject and of the class."""
        priors = self.priors()
        return super().image_sets() + ([priors] if priors else [])

    def train_source(self, samples: ImageSet) -> SubjectBatches:
        """Batches of both."""
        return SubjectBatches(samples, self.priors(), self.batch_size, seed=self.seed)


def _overlap(first: Path, second: Path) -> bool:
    return first.is_relative_to(second) or second.is_relative_to(first)
