"""Real handwritten digits that come with scikit-learn: a task in seconds without a download.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from peft_modal.data.shots import draw_per_class
from peft_modal.data.splits import Part, SplitData
from peft_modal.extras import require
from peft_modal.ranges import NonNegativeInt, PositiveInt
from peft_modal_vision.pictures import LabelledPictures
from peft_modal_vision.transforms import Normalize

TEST_START: Final = 1000
"""The pictures from here on are tested on, 797 of 1,797; the others may be drawn to train and validate on."""
_WHITE: Final = 16
"""The highest value of a pixel."""


class Digits(SplitData):
    """Handwritten digits, 8 x 8 pixels enlarged; real pictures, ten classes, one test set of 797 for all seeds.

    Args:
        shots: Training pictures per class.
        val_per_class: Validation pictures per class.
        resolution: Sides in pixels.
        normalize: See `Patterns`.
        batch_size: Pictures per training batch; evaluation takes twice as many.
        seed: Of the draw of training and validation pictures, and of their order. Not of the test pictures.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        *,
        shots: PositiveInt = 16,
        val_per_class: PositiveInt = 16,
        resolution: PositiveInt = 32,
        normalize: Normalize = "half",
        batch_size: PositiveInt = 32,
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.shots = shots
        self.val_per_class = val_per_class
        self.resolution = resolution
        self.normalize: Normalize = normalize
        self.class_names = self.class_names_without_data({})

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The ten digits; see `peft_modal.inspection.classes.NamesClasses`."""
        del arguments
        return tuple("0123456789")

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size and normalisation."""
        return {"resolution": self.resolution, "normalize": self.normalize}

    def class_counts(self) -> list[int]:
        """Training pictures of each class; see `CountsClasses`."""
        return [self.shots] * len(self.class_names)

    def load(self, part: Part) -> LabelledPictures:
        """The pictures of a split."""
        images, labels = _digits()
        if part == "test":
            chosen = list(range(TEST_START, len(labels)))
        else:
            drawn = draw_per_class(
                labels[:TEST_START].tolist(), self.class_names, self.shots + self.val_per_class, seed=self.seed,
                where="data 'digits'", asked="data.shots with data.val_per_class",
            )  # fmt: skip
            taken = slice(None, self.shots) if part == "train" else slice(self.shots, None)
            chosen = [place for places in drawn for place in places[taken]]
        return LabelledPictures(_enlarged(images[chosen], self.resolution), labels[chosen], self.normalize)


def _digits() -> tuple[Tensor, Tensor]:
    """All pictures (n, 1, 8, 8) uint8 and their labels (n,)."""
    found = require("sklearn.datasets", extra="vision").load_digits()
    images = torch.from_numpy(found.images)[:, None]
    return (images * (255 / _WHITE)).round().to(torch.uint8), torch.from_numpy(found.target).long()


def _enlarged(images: Tensor, side: int) -> Tensor:
    """Pictures (n, 3, side, side) of (n, 1, 8, 8); the three channels share memory."""
    large: Tensor = functional.resize(images, [side, side], interpolation=InterpolationMode.BICUBIC)
    return large.expand(-1, 3, -1, -1)
