"""The shipped nano ViT: it loads, and what it learnt of some shapes and textures helps with others."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor

from peft_modal_vision.backbone import ViT
from peft_modal_vision.data import Patterns

MOST_BYTES = 3_000_000


def nano(weights: str) -> ViT:
    backbone = ViT(weights=weights)
    backbone.load_weights()
    return backbone


def features(backbone: ViT, images: Tensor) -> Tensor:
    """What its own classifier would read, and the mean of its patches."""
    with torch.no_grad():
        found = backbone({"image": images})
    both = torch.cat([found.extras["pooled"], found.tokens[:, 1:].mean(1)], dim=1)
    return both - both.mean(0)


def nearest_mean(backbone: ViT, data: Patterns) -> float:
    """Accuracy of the nearest class mean of the training pictures, by cosine; nothing is trained."""
    parts = [data.load(part) for part in ("train", "test")]
    (train, test) = (features(backbone, torch.stack([sample["image"] for sample in part])) for part in parts)
    means = torch.stack([train[parts[0].labels == label].mean(0) for label in range(data.num_classes)])
    guess = (torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(means, dim=1).T).argmax(1)
    return float((guess == parts[1].labels).float().mean())


def test_it_is_small() -> None:
    with resources.as_file(resources.files("peft_modal_vision") / "nano.safetensors") as path:
        assert path.stat().st_size < MOST_BYTES
    assert sum(parameter.numel() for parameter in ViT(weights="random").network.parameters()) < 900_000


@pytest.mark.slow
def test_its_features_tell_new_shapes_and_textures_apart() -> None:
    data = Patterns(shots=16, test_per_class=20)
    learnt, random = (nearest_mean(nano(weights), data) for weights in ("nano", "random"))
    assert learnt >= 2 * random
    assert learnt >= 4 / data.num_classes
