"""Generated pictures as data of the diffusion modality; see `peft_modal.data.drawn`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_modal.data.drawn import (
    COLOURS,
    SHAPES,
    Drawn,
    draw_open_ended,
    draw_scenes,
    draw_style,
    draw_subject,
    object_name,
    shows_style,
    shows_subject,
)
from peft_modal.data.drawn.judge import colour_of
from peft_modal.data.epochs import Batch, BatchSource, DrawnBatches
from peft_modal.data.seeding import seeded
from peft_modal.data.splits import Part, SplitData
from peft_modal.errors import ConfigError
from peft_modal.ranges import PositiveInt
from peft_modal_diffusion.probes import Check, Probe

Kind = Literal["scenes", "open_ended", "subject", "style"]
_CHUNK = 16
_SUBJECT_PROBES = 24
_OBJECTS: Final = tuple((colour, shape) for shape in range(len(SHAPES)) for colour in range(len(COLOURS)))
"""Every pair, as a prompt each."""
_SHOWS: Final[Mapping[str, Check]] = MappingProxyType({"subject": shows_subject, "style": shows_style})
_CAPTIONED: Final[Mapping[str, Callable[..., Drawn]]] = MappingProxyType(
    {"scenes": draw_scenes, "subject": draw_subject, "style": draw_style}
)


class DrawnPictures(SplitData):
    """Generated pictures with captions: `pixels` (B, 3, S, S) in -1..1, `caption` as text, `key` of each sample.

    `scenes` and `open_ended` are drawn anew for every batch, so an epoch is a number of steps; `subject` and `style`
    are fixed small sets. After a run on one of these, `pictures/concept` is the share of its pictures that show it, and
    `pictures/colour` that of pictures of `a red circle` and the 47 other pairs that have the colour, by their pixels.

    Args:
        kind: `scenes` with captions, `open_ended` without, or a concept to fine-tune for: a `subject`, a `style`.
        steps: Batches per epoch of what is drawn anew.
        count: Training pictures of a concept.
        val_count: Pictures held out for validation.
        prior: Put as many scenes, drawn anew and marked `prior`, beside the pictures of a concept in every batch: what
            the model knows already, against forgetting.
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
        prior: bool = False,
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
        if prior and kind not in _SHOWS:
            raise ConfigError(f"data.prior: {kind} have nothing new, which scenes could be put beside; leave it out")
        self.prior = prior
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
        if self.kind in {"scenes", "open_ended"}:
            return DrawnBatches(self.draw, self.steps)
        concept = super().train_source(samples)
        return _WithPrior(concept, self) if self.prior else concept

    def evaluation_set(self, samples: Any) -> Dataset[Batch]:  # noqa: ANN401 — what `load` returned
        """The pictures as drawn."""
        return samples

    def draw(self, *key: int | str) -> dict[str, Any]:
        """One training batch, by its key."""
        return self._draw(self.batch_size, "train", *key)

    def draw_prior(self, *key: int | str) -> dict[str, Any]:
        """One batch of scenes, by its key."""
        return self._draw(self.batch_size, "prior", *key, kind="scenes")

    def probes(self) -> tuple[Probe, ...]:
        """Pictures of the concept, and of every single object."""
        objects = tuple(object_name(colour, shape) for colour, shape in _OBJECTS)
        colours = torch.tensor([colour for colour, _ in _OBJECTS])
        prior = Probe(objects, {"colour": lambda pictures: colour_of(pictures) == colours}, is_prior=True)
        if self.kind == "open_ended":
            return ()
        if self.kind == "scenes":
            return (prior,)
        if self.kind == "subject":
            prompts = draw_subject(_SUBJECT_PROBES, seeded("probes", self.kind), side=self.resolution).captions
        else:
            prompts = tuple(f"sks style, {name}" for name in objects)
        return Probe(prompts, {"concept": _SHOWS[self.kind]}), prior

    def references(self, most: int) -> tuple[list[Tensor], list[str]]:
        """See `peft_modal_diffusion.probes.HasReferences`."""
        samples = self.load("train") or self.load("val")
        return [sample["pixels"] / 2 + 0.5 for sample in samples[:most]], [s["caption"] for s in samples[:most]]

    def _draw(self, count: int, *key: int | str, kind: Kind | None = None) -> dict[str, Any]:
        kind = kind or self.kind
        generator = seeded("drawn", kind, self.seed, *key)
        if kind == "open_ended":
            images: Tensor = draw_open_ended(count, generator, side=self.resolution)
            captions: tuple[str, ...] = ("",) * count
        else:
            drawn = _CAPTIONED[kind](count, generator, side=self.resolution)
            images, captions = drawn.images, drawn.captions
        name = "/".join(str(part) for part in (kind, self.seed, *key))
        return {"pixels": images * 2 - 1, "caption": list(captions), "key": [f"{name}/{i}" for i in range(count)]}


class _WithPrior:
    """Batches of a concept with as many scenes after each."""

    def __init__(self, concept: BatchSource, data: DrawnPictures) -> None:
        self.concept = concept
        self.data = data

    def __len__(self) -> int:
        return len(self.concept)

    def batch(self, epoch: int, index: int) -> Batch:
        concept = self.concept.batch(epoch, index)
        scenes = self.data.draw_prior(epoch, index)
        count = len(concept["key"])
        return {
            "pixels": torch.cat([concept["pixels"], scenes["pixels"][:count]]),
            "caption": [*concept["caption"], *scenes["caption"][:count]],
            "key": [*concept["key"], *scenes["key"][:count]],
            "prior": torch.arange(2 * count) >= count,
        }


def _samples(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in batch.items()} for i in range(len(batch["key"]))]
