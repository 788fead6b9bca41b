"""Handwritten digits as a small real task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_modal.cli.main import main
from peft_modal.errors import DataError
from peft_modal_vision.digits import Digits


def images(data: Digits, part: Any) -> set[bytes]:
    return {one["image"].numpy().tobytes() for one in data.load(part)}  # type: ignore[attr-defined]


def test_digits_are_drawn_by_the_seed_and_tested_on_the_same_pictures() -> None:
    first, same, other = (Digits(shots=3, val_per_class=2, seed=seed) for seed in (0, 0, 1))
    assert images(first, "train") == images(same, "train") != images(other, "train")
    assert torch.equal(first.load("test").images, other.load("test").images)
    parts = [images(first, part) for part in ("train", "val", "test")]
    assert [len(data) for data in (first.load("train"), first.load("val"), first.load("test"))] == [30, 20, 797]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert torch.bincount(first.load("train").labels).tolist() == [3] * 10 == first.class_counts()
    assert torch.bincount(first.load("val").labels).tolist() == [2] * 10


def test_digits_are_upright_pictures_of_the_size_asked_for() -> None:
    from sklearn.datasets import load_digits

    data = Digits(resolution=8, normalize="none")
    sample = data.load("test")[0]
    assert sample["image"].shape == (3, 8, 8)
    assert torch.allclose(sample["image"][0] * 16, torch.from_numpy(load_digits().images[1000]).float(), atol=0.05)
    large = Digits(resolution=48).load("test")[0]["image"]
    assert large.shape == (3, 48, 48)
    assert large.min() >= -1
    assert large.max() <= 1


def test_the_digits_can_be_told_apart_by_their_nearest_training_pictures() -> None:
    data = Digits(shots=40, resolution=8)
    train, test = data.load("train"), data.load("test")
    distances = torch.cdist(test.images.flatten(1).float(), train.images.flatten(1).float())
    found = train.labels[distances.argmin(1)]
    assert (found == test.labels).float().mean() > 0.9


def test_more_digits_than_there_are_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"class '\d' has \d+ samples to train on, data\.shots with data\.val_per_class"
    ):
        Digits(shots=95, val_per_class=10).load("train")


def test_a_command_trains_on_digits_and_tests_on_all_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    assert main([
        "fit", "--backbone=vit", "--backbone.weights=random", "--backbone.model=custom",
        f"--backbone.sizes={json.dumps(sizes)}", "--method=full", "--head=linear", "--task=classification",
        "--task.lr=3e-3", "--data=digits", "--data.resolution=16", "--data.shots=50", "--trainer.max_epochs=8",
        "--trainer.accelerator=cpu", "--out=run",
    ]) == 0  # fmt: skip
    # Chance is 0.1; it came to 0.48.
    assert json.loads(Path("run/metrics.json").read_text())["test/accuracy"] > 0.3
