"""Photos of one's own by class, classified by the names of the classes."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import re
import shutil
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


def test_shots_of_a_folder_are_drawn_as_those_of_published_sets(root: Path) -> None:
    data = Folder(root=root, shots=3, seed=2, resolution=32, test_share=0.0, val_share=0.0)
    found = [item.path for item in data.find().train]
    random.seed(2)
    assert found == [path for name in CLASSES for path in random.sample(sorted((root / name[:3]).iterdir()), 3)]


def test_of_a_folder_at_most_four_shots_are_validated_on(root: Path) -> None:
    for part in ("train", "val", "test"):
        (root / part).mkdir()
    for name in CLASSES:
        for part, first, last in (("train", 0, 5), ("val", 5, 10), ("test", 10, 12)):
            (root / part / name[:3]).mkdir()
            for path in sorted((root / name[:3]).iterdir())[: last - first]:
                path.rename(root / part / name[:3] / path.name)
        (root / name[:3]).rmdir()
    for shots, val in ((1, 1), (5, 4), (16, 4)):
        index = Folder(root=root, shots=shots, resolution=32).find()
        assert [len(part) // 3 for part in (index.train, index.val, index.test)] == [min(shots, 5), val, 2]


def write_table(folder: Path, rows: list[tuple[object, ...]]) -> Path:
    write_images(folder / "images", len(rows) - 1, size=(20, 20))
    path = folder / "photos.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def test_a_csv_says_how_classes_are_called_and_numbers_are_their_order(tmp_path: Path) -> None:
    names = {2: 'a "big" cat, grey', 10: "\U0001f98a fox", 1: "d'Artagnan's  dog"}
    rows: list[tuple[object, ...]] = [("path", "label", "classname")]
    rows += [(f"images/{i:02d}.png", label, names[label]) for i, label in enumerate([10, 2, 1] * 4)]
    data = Folder(root=write_table(tmp_path, rows), resolution=32)
    data.setup()
    # Neither the order of the alphabet (1, 10, 2) nor that of the file; white space is one space.
    assert data.class_names == ("d'Artagnan's dog", 'a "big" cat, grey', "\U0001f98a fox")
    for part in ("train", "val", "test"):
        for item in data.load(part).items:  # type: ignore[arg-type]
            assert item.label == {0: 2, 1: 1, 2: 0}[int(item.path.stem) % 3]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("a", "cat"), ("a", "dog"), ("b", "owl")], "line 3: label a is both 'cat' and 'dog'"),
        ([("a", "cat"), ("a", ""), ("b", "owl")], "line 3: label a has no classname"),
        ([("a", "Cat"), ("a", "Cat"), ("b", "cat")], "calls two folders 'cat', 'a' and 'b'; classes are told apart"),
        ([("a", "_"), ("a", "_"), ("b", "cat")], "the name of class 'a' has no words"),
    ],
)
def test_names_of_a_csv_that_cannot_serve_are_refused(
    tmp_path: Path, rows: list[tuple[str, str]], sentence: str
) -> None:
    table = [("path", "label", "classname"), *((f"images/{i:02d}.png", *row) for i, row in enumerate(rows))]
    with pytest.raises(DataError, match=sentence):
        Folder(root=write_table(tmp_path, table), resolution=32, val_share=0.0, test_share=0.0).find()


def test_a_name_of_five_hundred_words_and_one_of_signs_are_classes_like_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(root.parent)
    long = " ".join(f"word{i}" for i in range(500))
    Path("odd.txt").write_text(f'n01 {long}\nn02 it\'s "quoted" \U0001f600\nn03 {{}} and {{name}}\n', encoding="utf-8")
    command = [
        "fit", "--config=clip_lora.yaml", "--data=folder", "--data.root=photos", "--data.names=odd.txt",
        "--data.resolution=32", "--data.normalize=half", "--trainer.fast_dev_run=true", "--out=run",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert main(command) == 0
    # The nano spells the second name byte by byte, so that it is cut, too.
    assert "2 of 3 texts with names of classes are longer than the 20 tokens" in caplog.text
    assert main(["predict", "--adapter=run/adapter.safetensors", "--input=photos/n01", "--out=out"]) == 0
    rows = json.loads(Path("out/predictions.json").read_text(encoding="utf-8"))
    assert set(rows[0]["probabilities"]) == {long, 'it\'s "quoted" \U0001f600', "{} and {name}"}


def test_a_file_whose_name_is_no_text_is_trained_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    first = next(iter(sorted((root / "n01").iterdir())))
    try:
        first.rename(os.fsdecode(os.fsencode(root / "n01") + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes text alone")
    command = [
        "fit", "--config=clip_lora.yaml", "--data=folder", "--data.root=photos", "--data.resolution=32",
        "--data.normalize=half", "--data.test_share=0", "--data.val_share=0", "--trainer.fast_dev_run=true",
        "--out=run",
    ]  # fmt: skip
    assert main(command) == 0
    again = [*command[:-1], "--data.shots_file=run/data.json", "--out=again"]
    assert main(again) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("one", "needs two classes or more, and the data has one class: n01"),
        ("empty", "class folder 'photos/n02' holds no"),
        ("damaged", r"photos/n02/\d+.png' is no image that can be read here"),
        ("lost", "the file '.*gone.png' does not exist"),
    ],
)
def test_photos_that_cannot_serve_end_a_run_in_a_sentence(
    root: Path, change: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root.parent)
    source = "photos"
    if change == "lost":
        Path("photos.csv").write_text("path,label\nphotos/gone.png,a\n", encoding="utf-8")
        source = "photos.csv"
    for path in sorted((root / "n02").iterdir()):
        if change == "damaged":
            path.write_bytes(b"not a picture")
        elif change in {"empty", "one"}:
            path.unlink()
    if change == "one":
        (root / "n02").rmdir()
        shutil.rmtree(root / "n03")
    command = [
        "fit", "--config=clip_lora.yaml", "--data=folder", f"--data.root={source}", "--data.resolution=32",
        "--data.normalize=half", "--trainer.max_epochs=1", "--out=run",
    ]  # fmt: skip
    assert main(command) == 2
    told = capsys.readouterr().err
    assert re.search(sentence, told), told
    assert "Traceback" not in told


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
