"""Generated pictures as data of the diffusion modality; see `peft_modal.data.drawn`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

from torch import Tensor
from torch.utils.data import Dataset

from peft_modal.data.drawn import Drawn, draw_open_ended, draw_scenes, draw_style, draw_subject
from peft_modal.data.epochs import Batch, BatchSource
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData
from peft_modal.ranges import PositiveInt

Kind = Literal["scenes", "open_ended", "subject", "style"]
_CHUNK = 16
_CAPTIONED: Final[Mapping[str, Callable[..., Drawn]]] = MappingProxyType(
    {"scenes": draw_scenes, "subject": draw_subject, "style": draw_style}
)


class DrawnPictures(SplitData):
    """Generated pictures with captions: `pixels` (B, 3, S, S) in -1..1, `caption` as text, `key` of each sample.

    `scenes` and `open_ended` are drawn anew for every batch, so an epoch is a number of steps; `subject` and `style`
    are fixed small sets.

    Args:
        kind: `scenes` with captions, `open_ended` without, or a concept to fine-tune for: a `subject`, a `style`.
        steps: Batches per epoch of what is drawn anew.
        count: Training pictures of a concept.
        val_count: Pictures held out for validation.
        resolution: Sides in pixels.
        batch_size: Pictures per batch.
        seed: Of what is drawn.
        num_workers: Processes that draw.
    """

    def __init__(
        self,
        *,
        kind: Kind = "scenes",
        steps: PositiveInt = 100,
        count: PositiveInt = 48,
        val_count: PositiveInt = 48,
        resolution: PositiveInt = 32,
        batch_size: PositiveInt = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.kind: Kind = kind
        self.steps = steps
        self.count = count
        self.val_count = val_count
        self.resolution = resolution

    @property
    def preprocessing(self) -> dict[str, object]:
        """Sides and range of the pictures."""
        return {"resolution": self.resolution, "range": [-1, 1]}

    def load(self, part: Part) -> Sequence[dict[str, Any]]:
        """The pictures of a split; those of training are drawn later where they are drawn anew."""
        if part == "train" and self.kind in {"scenes", "open_ended"}:
            return ()
        count = self.count if part == "train" else self.val_count
        return [
            sample
            for start in range(0, count, _CHUNK)
            for sample in _samples(self._draw(min(_CHUNK, count - start), part, start))
        ]

    def train_source(self, samples: Any) -> BatchSource:  # noqa: ANN401 — what `load` returned
        """Batches drawn anew, or shuffled from the fixed set."""
        return _Redrawn(self) if self.kind in {"scenes", "open_ended"} else super().train_source(samples)

    def evaluation_set(self, samples: Any) -> Dataset[Batch]:  # noqa: ANN401 — what `load` returned
        """The pictures as drawn."""
        return samples

    def draw(self, *key: int | str) -> dict[str, Any]:
        """One training batch, by its key."""
        return self._draw(self.batch_size, "train", *key)

    def _draw(self, count: int, *key: int | str) -> dict[str, Any]:
        generator = seeded("drawn", self.kind, self.seed, *key)
        if self.kind == "open_ended":
            images: Tensor = draw_open_ended(count, generator, side=self.resolution)
            captions: tuple[str, ...] = ("",) * count
        else:
            drawn = _CAPTIONED[self.kind](count, generator, side=self.resolution)
            images, captions = drawn.images, drawn.captions
        name = "/".join(str(part) for part in (self.kind, self.seed, *key))
        return {"pixels": images * 2 - 1, "caption": list(captions), "key": [f"{name}/{i}" for i in range(count)]}


class _Redrawn:
    def __init__(self, data: DrawnPictures) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps

    def batch(self, epoch: int, index: int) -> Batch:
        return self.data.draw(epoch, index)


def _samples(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in batch.items()} for i in range(len(batch["key"]))]
