"""Parts of objects: which part belongs to which category, and what a head that finds them returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PartOutput(NamedTuple):
    """What was found at Q places of each cloud."""

    log_probs: Tensor
    """Over all parts of all categories, (B, Q, K)."""
    category: Tensor
    """Of each cloud, (B,) int64."""


class PartTable:
    """Categories of objects and their parts, read off the class names `category/part`.

    Categories are counted in the order in which their first part is named. Names without a category belong to one that
    has no name.

    Args:
        class_names: One for each part, in label order.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        owners = [name.rpartition("/")[0] for name in class_names]
        self.categories = tuple(dict.fromkeys(owners))
        """Names."""
        self.category_of = torch.tensor([self.categories.index(owner) for owner in owners], dtype=torch.int64)
        """Category of each part, (K,)."""

    @property
    def num_categories(self) -> int:
        """How many there are."""
        return len(self.categories)

    def parts_of(self, category: int) -> list[int]:
        """The parts of a category, ascending."""
        return (self.category_of == category).nonzero().flatten().tolist()

    def found(self, output: PartOutput) -> Tensor:
        """The likeliest part at every place, (B, Q) int64, among the parts of the cloud's own category."""
        is_own = self.category_of.to(output.category.device) == output.category[:, None]  # (B, K)
        return output.log_probs.masked_fill(~is_own[:, None], -torch.inf).argmax(2)
