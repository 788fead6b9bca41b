"""Recall of retrieval, against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peft_modal_clip.retrieval import FIGURES, RANKS, RetrievalRecall, hit_chances


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(images: torch.Tensor, texts: torch.Tensor, counts: list[int]) -> dict[str, float]:
    """Sort all candidates of every query, and look."""
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    found = dict.fromkeys(FIGURES, 0.0)
    similarities = images @ texts.T
    for i in range(len(images)):
        order = similarities[i].argsort(descending=True).tolist()
        for rank in RANKS:
            found[f"image_to_text_r{rank}"] += any(owners[t] == i for t in order[:rank]) / len(images)
    for t in range(len(texts)):
        order = similarities[:, t].argsort(descending=True).tolist()
        for rank in RANKS:
            found[f"text_to_image_r{rank}"] += (owners[t] in order[:rank]) / len(texts)
    return found


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_recalls_are_those_of_sorting(batch: int) -> None:
    counts = [1 + i % 5 for i in range(40)]
    images, texts = unit(40, 6), unit(sum(counts), 6, seed=1)
    recall = RetrievalRecall()
    start = 0
    for first in range(0, 40, batch):
        own = counts[first : first + batch]
        recall.update(images[first : first + batch], texts[start : start + sum(own)], own)
        start += sum(own)
    found = recall.compute()
    assert found == pytest.approx(by_hand(images, texts, counts))
    assert (recall.num_images, recall.num_texts) == (40, sum(counts))
    assert 0 < found["image_to_text_r1"] < found["image_to_text_r5"] < found["image_to_text_r10"] < 1
    recall.reset()
    recall.update(images[:1], images[:1], [1])
    assert recall.compute()["image_to_text_r1"] == 1


def test_a_picture_that_has_one_right_text_first_counts() -> None:
    images = torch.eye(2)
    # The other caption of the first picture looks like the second picture, and the second's like nothing.
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    recall = RetrievalRecall()
    recall.update(images, texts, [2, 1])
    found = recall.compute()
    assert found["image_to_text_r1"] == 0.5
    # Of the texts the first is right at first, the second is not, and the third is.
    assert found["text_to_image_r1"] == pytest.approx(2 / 3)


def test_a_network_to_which_all_is_one_does_as_chance() -> None:
    recall = RetrievalRecall()
    recall.update(torch.ones(20, 3), torch.ones(20, 3), [1] * 20)
    found = recall.compute()
    for rank in RANKS:
        assert found[f"image_to_text_r{rank}"] == found[f"text_to_image_r{rank}"] == pytest.approx(rank / 20)


def test_an_own_text_as_near_as_another_does_not_count_as_a_mistake() -> None:
    similarities = torch.tensor([[0.9, 0.9, 0.1]])
    assert hit_chances(similarities, torch.tensor([[True, True, False]]))[0].tolist() == [1, 1, 1]
    assert hit_chances(similarities, torch.tensor([[True, False, False]]))[0].tolist() == [0.5, 1, 1]
    assert hit_chances(similarities, torch.tensor([[False, False, True]]))[0].tolist() == [0, 1, 1]
