"""What the network and its adapter make of a few samples, for a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from peft_modal.report import Best, Gallery, Kept, Section, Tile, batch_size, draw, element

_SAMPLES: Final = 2
Views = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]
"""Samples for the modality's renderer, by their titles."""


class SightCollector:
    """Keeps a seeded draw of samples and shows them as the network sees them.

    Args:
        views: Of the backbone, and of each method; what they make of a sample.
        seed: Of the draw.
    """

    def __init__(self, *views: Views, seed: int) -> None:
        self.views = views
        self.seed = seed
        self._count = 0
        self._drawn = Best(_SAMPLES)

    def add(self, batch: Mapping[str, Any], output: object) -> None:
        """Take in a batch."""
        del output
        size = batch_size(batch)
        for i in range(size):
            value = draw(self.seed, self._count + i)
            if self._drawn.wants(value, self._count + i):
                self._drawn.add(Kept(self._count + i, element(batch, i), None, value), self._count + i)
        self._count += size

    def sections(self) -> tuple[Section, ...]:
        """One gallery for each sample; nothing where there is nothing to show."""
        galleries = []
        for kept in self._drawn.samples():
            shown = {title: view for views in self.views for title, view in views(kept.sample).items()}
            if shown:
                tiles = tuple(Tile(title, view) for title, view in shown.items())
                galleries.append(Gallery(tiles, f"Sample {kept.index}"))
        lead = f"A seeded draw among {self._count:,} samples."
        return (Section("sight", "What the network sees", tuple(galleries), lead),) if galleries else ()
