"""Photos of one's own by class, classified by the names of the classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_folders import write_images

from peft_modal.__main__ import main
from peft_modal.errors import DataError
from peft_modal_clip.class_names import read_names
from peft_modal_clip.folder import Folder

CLASSES = ("n01 cat", "n02 dog", "n03 owl")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index, name in enumerate(("n01", "n02", "n03")):
        write_images(tmp_path / "photos" / name, 12, size=(40, 30), first=20 * index)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return tmp_path / "photos"


def test_half_of_the_classes_are_trained_and_all_tested(root: Path) -> None:
    data = Folder(root=root, classes="base", shots=4, resolution=32)
    data.setup("fit")
    data.setup("test")
    labels = {part: [int(sample["label"]) for sample in data.load(part)] for part in ("train", "val", "test")}
    assert sorted(labels["train"]) == [0] * 4 + [1] * 4
    assert set(labels["val"]) == {0, 1}
    assert set(labels["test"]) == {0, 1, 2}
    assert data.class_names == ("n01", "n02", "n03")


def test_the_shots_of_half_are_those_of_all(root: Path) -> None:
    chosen = {}
    for classes in ("all", "base"):
        data = Folder(root=root, classes=classes, shots=4, resolution=32)  # type: ignore[arg-type]
        chosen[classes] = [item.path for item in data.find().train]
    assert chosen["base"] == [path for path in chosen["all"] if "n03" not in path.parts]


def test_names_of_a_file_stand_for_folders(root: Path) -> None:
    data = Folder(root=root, names=root.parent / "names.txt", resolution=32)
    data.setup("fit")
    assert data.class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("n01 cat\nn02 dog", "has no line for 'n03'"), ("n01 cat\nn02 cat\nn03 owl", "calls two folders 'cat'")],
)
def test_names_that_do_not_fit_are_refused(root: Path, text: str, sentence: str) -> None:
    file = root.parent / "other.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        Folder(root=root, names=file, resolution=32).find()
    with pytest.raises(DataError, match="cannot be read as text"):
        read_names(root.parent / "absent.txt", ())


def test_a_picture_fills_the_square_with_clips_norm(root: Path) -> None:
    data = Folder(root=root, resolution=32, augment=[])
    data.setup("fit")
    image = data.load("test")[0]["image"]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32


@pytest.mark.slow
def test_photos_are_tuned_and_predicted_by_commands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(root.parent / "cache"))
    own = [
        "--data=folder",
        "--data.root=photos",
        "--data.names=names.txt",
        "--data.resolution=32",
        "--data.normalize=half",
    ]
    assert main(["fit", "--config", "clip_mask_tuning.yaml", *own, "--trainer.fast_dev_run=true", "--out", "run"]) == 0
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", "photos/n01", "--out", "out"]) == 0
    rows = json.loads(Path("out/predictions.json").read_text(encoding="utf-8"))
    assert len(rows) == 12
    assert set(rows[0]["probabilities"]) == {"cat", "dog", "owl"}


@pytest.mark.slow
def test_half_of_ones_own_classes_is_trained_by_a_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(root.parent / "cache"))
    own = [
        "--data=folder",
        "--data.root=photos",
        "--data.classes=base",
        "--data.resolution=32",
        "--data.normalize=half",
    ]
    command = ["fit", "--config", "clip_base_to_new.yaml", *own, "--data.batch_size=4", "--trainer.max_epochs=1"]
    assert main([*command, "--out", "run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    assert {"test/accuracy_base", "test/accuracy_new", "test/harmonic_mean"} <= set(figures)
