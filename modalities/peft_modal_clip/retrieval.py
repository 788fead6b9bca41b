"""Retrieval between pictures and texts: how often what belongs together is among the first K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

RANKS: Final = (1, 5, 10)
DIRECTIONS: Final = ("image_to_text", "text_to_image")
FIGURES: Final = tuple(f"{direction}_r{rank}" for direction in DIRECTIONS for rank in RANKS)
_CHUNK: Final = 1024
"""Rows of similarities that are held at a time."""


class RetrievalRecall(nn.Module):
    """Recall at 1, 5 and 10 over all pictures and texts of an evaluation, both ways.

    A picture counts where the best of its own texts is among the first K of all texts; a text where its picture is
    among the first K of all pictures, as COCO's and Flickr30K's figures for CLIP are. Of answers that are equally near,
    each is as likely to come first: a network to which all is one does no better than chance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []
        self._owners: list[Tensor] = []
        self.num_images = 0

    @property
    def num_texts(self) -> int:
        """Texts so far."""
        return sum(map(len, self._texts))

    def update(self, images: Tensor, texts: Tensor, counts: Sequence[int]) -> None:
        """Take in a batch.

        Args:
            images: Unit vectors (B, D).
            texts: Unit vectors (T, D), those of the first picture first.
            counts: How many of them each picture has, B numbers that add up to T.
        """
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self._images.append(images.detach().float().cpu())
        self._texts.append(texts.detach().float().cpu())
        self._owners.append(owners + self.num_images)
        self.num_images += len(images)

    def compute(self) -> dict[str, float]:
        """Each of `FIGURES` in 0..1."""
        images, texts, owners = map(torch.cat, (self._images, self._texts, self._owners))
        pictures = torch.arange(len(images))
        found: dict[str, float] = {}
        for direction, (queries, labels, answers, answer_labels) in {
            "image_to_text": (images, pictures, texts, owners),
            "text_to_image": (texts, owners, images, pictures),
        }.items():
            chances = torch.cat(
                [
                    hit_chances(own @ answers.T, label[:, None] == answer_labels)
                    for own, label in zip(torch.split(queries, _CHUNK), torch.split(labels, _CHUNK), strict=True)
                ]
            )
            found |= {
                f"{direction}_r{rank}": float(chance) for rank, chance in zip(RANKS, chances.mean(0), strict=True)
            }
        return found


def hit_chances(similarities: Tensor, is_right: Tensor) -> Tensor:
    """The chance (Q, 3) float64 that the best right answer of each query is among the first 1, 5 and 10.

    Args:
        similarities: (Q, A).
        is_right: (Q, A) bool, with a right answer in each row.
    """
    best = similarities.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
    before = ((similarities > best) & ~is_right).sum(1)
    beside = ((similarities == best) & ~is_right).sum(1)
    return torch.stack([((rank - before) / (1 + beside)).double().clamp(0, 1) for rank in RANKS], dim=1)
