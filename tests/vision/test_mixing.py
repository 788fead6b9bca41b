"""mixup and CutMix: pictures and labels are mixed by the same share, and all of it follows from the generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import write_images
from tiny_backbones import TinyViT

from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal.tasks.classification import Classification
from peft_modal_heads.linear import LinearHead
from peft_modal_vision.data import Folder
from peft_modal_vision.mixing import mixed


def constant(count: int = 4, side: int = 8) -> dict[str, Any]:
    """Picture i is i everywhere, and so is its label."""
    label = torch.arange(count)
    return {"image": label.view(-1, 1, 1, 1).float().expand(-1, 3, side, side).clone(), "label": label}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("seed", range(8))
def test_a_picture_holds_as_much_of_each_as_its_labels_say(kind: str, seed: int) -> None:
    batch = constant()
    made = mixed(batch, [kind], seeded(seed))
    assert torch.equal(batch["image"], constant()["image"]), "the batch that was given stays"
    assert made[PARTNER_LABEL].tolist() == [3, 2, 1, 0]
    own = made[OWN_SHARE]
    expected = own * made["label"] + (1 - own) * made[PARTNER_LABEL]
    assert torch.allclose(made["image"].flatten(1).mean(1), expected, atol=1e-5)
    if kind == "cutmix":
        whole = made["image"] == made["label"].view(-1, 1, 1, 1)
        assert (whole | (made["image"] == made[PARTNER_LABEL].view(-1, 1, 1, 1))).all()


def test_shares_are_drawn_as_published() -> None:
    mixups = torch.tensor([float(mixed(constant(2, 1), ["mixup"], seeded(i))[OWN_SHARE][0]) for i in range(2000)])
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1)).
    assert float(mixups.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(mixups.var()) == pytest.approx(1 / 10.4, rel=0.06)


def test_with_both_kinds_each_comes_in_half_of_the_batches() -> None:
    def is_mixup(seed: int) -> bool:
        image = mixed(constant(2, 16), ["cutmix", "mixup"], seeded(seed))["image"]
        return bool(((image > 0) & (image < 1)).any())

    assert sum(is_mixup(seed) for seed in range(400)) == pytest.approx(200, abs=40)


def test_the_same_generator_gives_the_same_batch_and_none_asked_for_none_made() -> None:
    kinds = ["mixup", "cutmix"]
    first, second = (mixed(constant(), kinds, seeded(3)) for _ in range(2))
    assert torch.equal(first["image"], second["image"])
    batch = constant()
    assert mixed(batch, ["flip"], seeded(0)) is batch


def task(**options: Any) -> Classification:
    backbone = TinyViT(depth=1)
    adapter = LinearProbe().attach(backbone)
    return Classification(backbone, adapter, LinearHead(backbone.feature_spec(), 3), ("a", "b", "c"), **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weights": [1.0, 2.0, 5.0]}])
def test_the_loss_counts_both_labels(options: Any) -> None:
    logits = torch.randn(4, 3)
    one, other = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 1])
    made = task(**options)

    def loss(**labels: Any) -> float:
        return float(made.losses(labels, logits)["loss"])

    assert loss(label=one, **{PARTNER_LABEL: other, OWN_SHARE: torch.full((4,), 0.3)}) == pytest.approx(
        0.3 * loss(label=one) + 0.7 * loss(label=other), rel=1e-5
    )


def test_a_folder_gives_mixed_batches_in_training_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_images(tmp_path / name, 10)
    data = Folder(root=tmp_path, resolution=16, augment=["mixup"], batch_size=4, normalize="none")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert PARTNER_LABEL in batch
    assert PARTNER_LABEL not in next(iter(data.val_dataloader()))
    again = Folder(root=tmp_path, resolution=16, augment=["mixup"], batch_size=4, normalize="none")
    again.setup("fit")
    assert torch.equal(batch["image"], next(iter(again.train_dataloader()))["image"])
