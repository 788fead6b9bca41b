"""Pictures of one's own with captions, for contrastive fine-tuning and for retrieval.

A batch is a dict: `image` (B, 3, S, S) float32, normalised by `mean` and `deviation` (B, 3), `caption`, B texts, and
for evaluation `captions`, for each picture all it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, default_collate

from peft_modal.data.captions import Captioned, CaptionIndex, read_caption_csv, scan_captions
from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.images import read_image
from peft_modal.data.splits import PARTS, Part, ShuffledBatches, SplitData
from peft_modal.ranges import NonNegativeInt, PositiveInt, Share
from peft_modal_clip.contrastive import CAPTIONS
from peft_modal_vision.transforms import Normalize, Resize, TrainingView, evaluation_view, normalized

Change = Literal["flip", "crop", "resized_crop", "colour", "erase"]


class CaptionedPictures(SplitData):
    """Pictures below a folder with captions in a `metadata.jsonl` or beside them, or those of a CSV `path,caption`.

    A folder is read as `peft_modal.data.captions.scan_captions` says, with splits where it has a folder `train`; each
    line of `a.txt` beside `a.png` is a caption. A CSV names a picture once for each of its captions and may have a
    column `split`. Training takes one of a picture's captions at random, evaluation all of them.

    Args:
        root: The folder or the CSV file.
        caption_column: Key of the captions; null is `text` in a `metadata.jsonl` and `caption` in a CSV.
        resolution: Side in pixels of what the network sees.
        resize: `fit` makes the shorter side that long and cuts the middle out, as CLIP does; see `folder`.
        augment: What changes training pictures at random. `flip` contradicts captions that tell left from right.
        crop_scale: Least and largest share of a picture's area for `resized_crop`.
        normalize: Mean and deviation of the channels; those that the weights were trained with.
        batch_size: Pictures per training batch, which are told apart by their captions; evaluation takes twice as many.
        val_share: Share of the training pictures held out for validation where there is no `val`.
        seed: Of the held-out pictures, and of order, captions and augmentation.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        caption_column: str | None = None,
        resolution: PositiveInt = 224,
        resize: Resize = "fit",
        augment: list[Change] = ["resized_crop"],  # noqa: B006 — never changed
        crop_scale: tuple[Share, Share] = (0.9, 1.0),
        normalize: Normalize = "clip",
        batch_size: PositiveInt = 64,
        val_share: Share = 0.1,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root = Path(root)
        self.caption_column = caption_column
        self.resolution = resolution
        self.resize: Resize = resize
        self.view = TrainingView(resolution, resize, augment, crop_scale)
        self.normalize: Normalize = normalize
        self.val_share = val_share
        self._index: CaptionIndex | None = None

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """None; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return ()

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size, how it comes about, and normalisation."""
        return {"resolution": self.resolution, "resize": self.resize, "normalize": self.normalize}

    def setup(self, stage: str | None = None) -> None:
        """Find pictures and captions.

        Raises:
            DataError: They cannot serve.
        """
        if self._index is None and PARTS[stage]:
            self._index = self._find()
        super().setup(stage)

    def load(self, part: Part) -> CaptionSet:
        """The pictures of a split; each is read when it is needed."""
        assert self._index is not None
        pictures: Sequence[Captioned] = getattr(self._index, part)
        return CaptionSet(pictures, self.resolution, self.resize, self.normalize)

    def train_source(self, samples: CaptionSet) -> BatchSource:
        """Shuffled batches, each picture read and changed anew, with one of its captions."""
        return _CaptionBatches(samples, self.batch_size, self.view, seed=self.seed)

    def collate(self, samples: list[Batch]) -> Batch:
        """A batch of evaluation samples; pictures may have different numbers of captions."""
        captions = [sample[CAPTIONS] for sample in samples]
        stacked = default_collate([{k: v for k, v in sample.items() if k != CAPTIONS} for sample in samples])
        return {**stacked, CAPTIONS: captions}

    def no_samples(self, part: Part) -> str:
        """Where pictures of a split come from."""
        return f"'{self.root}' has no {part} pictures: add a folder '{part}', or a column 'split' to a CSV."

    def _find(self) -> CaptionIndex:
        options: dict[str, Any] = {} if self.caption_column is None else {"column": self.caption_column}
        if self.root.suffix.lower() == ".csv" and not self.root.is_dir():
            return read_caption_csv(self.root, val_share=self.val_share, seed=self.seed, **options)
        return scan_captions(
            self.root, allow_empty=None, one_per_line=True, val_share=self.val_share, seed=self.seed, **options
        )


class CaptionSet(Dataset[Batch]):
    """Pictures on disk with all their captions.

    Args:
        pictures: Files and captions.
        resolution: Side in pixels.
        resize: See `evaluation_view`.
        normalize: See `normalized`.
    """

    def __init__(self, pictures: Sequence[Captioned], resolution: int, resize: Resize, normalize: str) -> None:
        self.pictures = pictures
        self.resolution = resolution
        self.resize: Resize = resize
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Batch:
        picture = self.pictures[index]
        pixels = evaluation_view(read_image(picture.path), self.resolution, self.resize)
        return {**self.sample(pixels, picture.captions[0]), CAPTIONS: picture.captions}

    def sample(self, pixels: Tensor, caption: str) -> Batch:
        """One sample of a square (3, S, S) in 0..1."""
        return {
            **{name: value[0] for name, value in normalized(pixels[None], self.normalize).items()},
            "caption": caption,
        }


class _CaptionBatches(ShuffledBatches):
    def __init__(self, samples: CaptionSet, batch_size: int, view: TrainingView, *, seed: int) -> None:
        super().__init__(samples, batch_size, seed=seed)
        self.set = samples
        self.view = view

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        made = []
        for index in chosen:
            picture = self.set.pictures[index]
            caption = picture.captions[int(torch.randint(len(picture.captions), (), generator=generator))]
            made.append(self.set.sample(self.view(read_image(picture.path), generator), caption))
        batch: Batch = default_collate(made)
        return batch
