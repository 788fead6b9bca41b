"""Data modules of tracking: what they share, and generated videos.

A training batch is a dict: `template` (B, 3, h, w), `search` (B, 3, H, W), and the target in both, x1, y1, x2, y2 in
their pixels: `template_box` (B, 4) and `target` (B, 4). A batch of evaluation holds whole videos: `video`, a list, and
`index` (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData
from peft_modal.errors import DataError
from peft_modal.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from peft_modal_tracking.boxes import Size, size_of
from peft_modal_tracking.moving import GENERATOR_VERSION, draw_videos
from peft_modal_tracking.moving.draw import is_present
from peft_modal_tracking.pairs import Group, Jitter, PairBatches, Recolouring, make_pair
from peft_modal_tracking.sequences import StoredFrames, Video
from peft_modal_tracking.steps import CropSettings
from peft_modal_vision.patterns import DOWNSTREAM, PRETRAIN
from peft_modal_vision.transforms import Normalize


class TrackingData(SplitData):
    """What the data modules share: crops, pairs for training, whole videos for evaluation.

    A subclass gives `load`; its constructor names what is its own and hands the rest on as `**options`.

    Args:
        batch_size: Pairs per training batch.
        videos_at_once: Videos that evaluation follows side by side.
        pairs: Training pairs per epoch.
        template_size: Height and width of the template in pixels, or one number for both; of the backbone.
        search_size: Likewise of the search picture.
        search_factor: Area of the search picture over that of the target's box, roughly.
        normalize: Mean and deviation of the channels: 0.5 each (`half`, the nano's), ImageNet's, or left in 0..1.
        max_gap: Most frames between template and search picture.
        scale_jitter: Deviation of the logarithm of a training search picture's scale.
        shift_jitter: Largest shift of it in mean sides of the box.
        min_visible: Least width and height of the target in a training search picture, in its pixels.
        augment: Mirror and recolour training pictures.
        max_blur: Largest radius in pixels of those that are blurred.
        seed: Of draws and augmentation.
        num_workers: Processes that prepare batches.

    Raises:
        ConfigError: A size is not one or two numbers.
    """

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 16,
        videos_at_once: PositiveInt = 8,
        pairs: PositiveInt = 131072,
        template_size: PositiveInt | list[PositiveInt] = 112,
        search_size: PositiveInt | list[PositiveInt] = 224,
        search_factor: PositiveFloat = 4.0,
        normalize: Normalize = "imagenet",
        max_gap: NonNegativeInt = 100,
        scale_jitter: NonNegativeFloat = 0.25,
        shift_jitter: NonNegativeFloat = 3.0,
        min_visible: PositiveFloat = 10.0,
        augment: bool = True,
        max_blur: NonNegativeFloat = 2.0,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.videos_at_once = videos_at_once
        self.pairs = pairs
        self.settings = CropSettings(
            size_of(template_size, "data.template_size"), size_of(search_size, "data.search_size"),
            search_factor=search_factor, normalize=normalize,
        )  # fmt: skip
        self.jitter = Jitter(scale_jitter, shift_jitter, min_visible)
        self.max_gap = max_gap
        self.recolouring = Recolouring(max_blur) if augment else None

    @property
    def preprocessing(self) -> dict[str, object]:
        """How pictures are cut out."""
        return self.settings.to_dict()

    def train_source(self, samples: Sequence[Video]) -> PairBatches:
        """Pairs, drawn anew for every epoch."""
        return PairBatches(
            self.groups_of(samples), self.settings, pairs=self.pairs, batch_size=self.batch_size,
            jitter=self.jitter, max_gap=self.max_gap, recolouring=self.recolouring, seed=self.seed,
        )  # fmt: skip

    def groups_of(self, samples: Sequence[Video]) -> Sequence[Group]:
        """What pairs are drawn from; one group, unless a subclass knows better."""
        return [Group(samples)]

    def plain_training_set(self, samples: Sequence[Video]) -> Dataset[Batch]:
        """One pair for each training video, unchanged."""
        return PlainPairs(samples, self.settings)

    def evaluation_set(self, samples: Sequence[Video]) -> Dataset[Batch]:
        """The videos."""
        return WholeVideos([video for video in samples if video.has_truth])

    def _evaluation_loader(self, part: Part) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        videos = WholeVideos([video for video in self._sets[part] if video.has_truth])
        if not len(videos):
            return []
        return DataLoader(
            videos, batch_size=self.videos_at_once, num_workers=self.num_workers, collate_fn=collate_videos
        )

    def no_samples(self, part: Part) -> str:
        """What a test split without boxes is good for."""
        return (
            f"data '{type(self).__name__}' has no {part} sequences whose boxes are known in every frame; use predict, "
            "and hand the files that it writes to the benchmark's server."
        )


class WholeVideos(Dataset[Batch]):
    """Videos, one a sample.

    Args:
        videos: They.
    """

    def __init__(self, videos: Sequence[Video]) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Batch:
        return {"index": torch.tensor(index), "video": self.videos[index]}


class PlainPairs(Dataset[Batch]):
    """The first and the middle usable frame of each video, for methods that calibrate.

    Args:
        videos: Of training.
        settings: Of the crops.
    """

    def __init__(self, videos: Sequence[Video], settings: CropSettings) -> None:
        self.videos = [video for video in videos if len(video.usable())]
        self.settings = settings

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Batch:
        """One pair.

        Raises:
            DataError: The boxes lie outside of all frames.
        """
        video = self.videos[index]
        usable = video.usable().tolist()
        for first, second in zip(usable, usable[len(usable) // 2 :], strict=False):
            made = make_pair(video, first, second, self.settings, None, seeded("plain pair", index))
            if made is not None:
                return made
        raise DataError(f"sequence '{video.name}': its boxes lie outside of its frames")


def collate_videos(samples: Sequence[Batch]) -> Batch:
    """A batch of evaluation."""
    return {
        "index": torch.stack([sample["index"] for sample in samples]),
        "video": [sample["video"] for sample in samples],
    }


class MovingObjects(TrackingData):
    """Generated videos: textured things that move, turn, swell and hide each other over a moving textured ground.

    Every target has another thing of its kind beside it; some leave the frame, some are tiny. `downstream` has other
    shapes, textures and motions than `pretrain`. Test videos are the same for all seeds. They are kept in the cache
    folder.

    Args:
        split: Which things and motions.
        videos: For training; the more there are, the less can be learnt by heart.
        val_videos: For validation.
        test_videos: For testing.
        frames: Of each video.
        train_frames: Of each training video, evenly spread over as long a time.
        frame_size: Height and width in pixels.
        seed: Of the training and validation videos, of draws and augmentation. Not of the test videos.
        options: Arguments of `TrackingData`.
    """

    def __init__(
        self,
        *,
        split: Literal["downstream", "pretrain"] = "downstream",
        videos: PositiveInt = 384,
        val_videos: PositiveInt = 8,
        test_videos: PositiveInt = 32,
        frames: PositiveInt = 40,
        train_frames: PositiveInt = 8,
        frame_size: tuple[PositiveInt, PositiveInt] = (96, 128),
        videos_at_once: PositiveInt = 32,
        pairs: PositiveInt = 1024,
        template_size: PositiveInt | list[PositiveInt] = 32,
        search_size: PositiveInt | list[PositiveInt] = 64,
        normalize: Normalize = "half",
        scale_jitter: NonNegativeFloat = 0.15,
        shift_jitter: NonNegativeFloat = 1.0,
        min_visible: PositiveFloat = 4.0,
        augment: bool = False,
        max_blur: NonNegativeFloat = 0.6,
        seed: int = 0,
        **options: Any,  # noqa: ANN401 — typed by `TrackingData`
    ) -> None:
        super().__init__(
            videos_at_once=videos_at_once, pairs=pairs, template_size=template_size, search_size=search_size,
            normalize=normalize, scale_jitter=scale_jitter, shift_jitter=shift_jitter, min_visible=min_visible,
            augment=augment, max_blur=max_blur, seed=seed, **options,
        )  # fmt: skip
        self.split: Literal["downstream", "pretrain"] = split
        self.counts: dict[Part, int] = {"train": videos, "val": val_videos, "test": test_videos}
        self.frames = frames
        self.train_frames = min(train_frames, frames)
        self.frame_size: Size = (frame_size[0], frame_size[1])

    @classmethod
    def class_names_without_data(cls, arguments: dict[str, Any]) -> tuple[str, ...]:
        """None; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return ()

    def load(self, part: Part) -> list[Video]:
        """The videos of a split: from the cache if made before, or drawn."""
        seed = 0 if part == "test" else self.seed
        count = self.counts[part]
        frames = self.train_frames if part == "train" else self.frames
        every = self.frames // frames

        def make() -> dict[str, Tensor]:
            vocabulary = DOWNSTREAM if self.split == "downstream" else PRETRAIN
            generator = seeded("moving objects", self.split, part, seed)
            return draw_videos(count, frames, self.frame_size, vocabulary, generator, every=every)

        key = {
            "generator": GENERATOR_VERSION, "split": self.split, "part": part, "seed": seed, "count": count,
            "frames": frames, "every": every, "frame_size": self.frame_size,
        }  # fmt: skip
        made = cached_tensors("moving-objects", key, make)
        return [
            Video(f"{part}_{i:04d}", StoredFrames(frames), boxes, is_present(share), rules="lasot")
            for i, (frames, boxes, share) in enumerate(zip(made["frames"], made["boxes"], made["share"], strict=True))
        ]
