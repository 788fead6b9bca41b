"""A few samples of each class, drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_modal.data.seeding import seeded
from peft_modal.errors import DataError


def draw_per_class(
    labels: Sequence[int], class_names: Sequence[str], count: int, *, seed: int, where: str, asked: str
) -> list[list[int]]:
    """Samples of each class, as many of all.

    The draw of a class depends on the seed, its name and its samples only, and begins with what a smaller one gives:
    the sixteen of a class include its four.

    Args:
        labels: The label of each sample.
        class_names: In label order.
        count: How many of each class.
        seed: Of the draw.
        where: Where the samples are from, for the error.
        asked: Which arguments asked for them, likewise.

    Returns:
        For each class the places of its samples in `labels`, in the order drawn.

    Raises:
        DataError: A class has fewer.
    """
    members: list[list[int]] = [[] for _ in class_names]
    for place, label in enumerate(labels):
        members[label].append(place)
    for name, places in zip(class_names, members, strict=True):
        if len(places) < count:
            raise DataError(
                f"{where}: class '{name}' has {len(places)} samples to train on, {asked} asks for {count}; "
                "lower it, or add samples."
            )
    return [
        [places[i] for i in torch.randperm(len(places), generator=seeded("shots", seed, name))[:count].tolist()]
        for name, places in zip(class_names, members, strict=True)
    ]
