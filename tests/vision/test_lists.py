"""Lists of pictures in the layouts of VTAB-1k, FGVC and NOAH, and what is said where one is wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_folders import coordinates

from peft_modal.cli.main import main
from peft_modal.errors import ConfigError, DataError
from peft_modal_vision.fewshot import FewShot
from peft_modal_vision.fgvc import Fgvc, label_order
from peft_modal_vision.lists import read_class_ids, read_list, split_line
from peft_modal_vision.vtab import VTAB_TASKS, Vtab, vtab_means

SMALL = {"resolution": 32, "batch_size": 4}


def picture(path: Path, blue: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coordinates(12, 20, blue=blue).save(path)


def write_vtab(folder: Path, counts: dict[str, int], classes: int) -> None:
    for name, count in counts.items():
        lines = []
        for i in range(count):
            path = f"images/{name}/{i:06d}.jpg"
            picture(folder / path, blue=i)
            lines.append(f"{path} {i % classes}\n")
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


LISTS = {"train800": 8, "val200": 2, "train800val200": 10, "test": 6}


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    write_vtab(tmp_path / "kitti", LISTS, classes=4)
    return tmp_path


def files(samples: Any) -> list[str]:
    return [item.path.parent.name for item in samples.items]


@pytest.mark.parametrize(
    ("train", "expected"), [("train800", {"train800": 8, "val200": 2}), ("train800val200", {"train800val200": 10})]
)
def test_vtab_reads_the_lists_of_the_protocol(kitti: Path, train: Any, expected: dict[str, int]) -> None:
    data = Vtab(root=kitti, task="kitti", train=train, **SMALL)
    data.setup(None)
    read = files(data.load("train")) + files(data.load("val"))
    assert {name: read.count(name) for name in read} == expected
    assert set(files(data.load("test"))) == {"test"}
    assert data.num_classes == 4
    assert [item.label for item in data.load("test").items] == [0, 1, 2, 3, 0, 1]


def test_vtab_makes_a_square_of_any_picture_and_changes_nothing_else(tmp_path: Path) -> None:
    write_vtab(tmp_path / "kitti", LISTS, classes=4)
    coordinates(200, 250).resize((300, 200)).save(tmp_path / "kitti/images/train800/000000.jpg")
    data = Vtab(root=tmp_path, task="kitti", normalize="none", batch_size=1, resolution=224)
    data.setup("fit")
    first = data.load("train")[0]["image"]
    assert first.shape == (3, 224, 224)
    # Nothing is cut away: the left and right edge are the darkest and brightest green there is.
    assert first[1, :, 0].mean() < 0.02
    assert first[1, :, -1].mean() > 0.95
    batch = data.train_source(data.load("train"))
    pictures = [batch.batch(0, i)["image"][0] for i in range(8)]
    assert sum(bool((one == first).all()) for one in pictures) == 1


def test_a_last_batch_of_fewer_pictures_is_dropped_or_kept(kitti: Path) -> None:
    def batches(**options: Any) -> int:
        data = Vtab(root=kitti, task="kitti", train="train800val200", **SMALL, **options)
        data.setup("fit")
        return len(data.train_dataloader())

    assert (batches(), batches(drop_last=False)) == (2, 3)


def test_nothing_to_validate_on_is_said_with_the_way_out(kitti: Path) -> None:
    data = Vtab(root=kitti, task="kitti", train="train800val200", **SMALL)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert data.no_samples("val") == "data.train is train800val200, which leaves no val pictures; set it to train800."


@pytest.mark.parametrize("name", ["pets", "oxford_iiit_pet"])
@pytest.mark.parametrize("folder", ["pets", "oxford_iiit_pet"])
def test_a_task_and_its_folder_may_be_called_by_an_alias(tmp_path: Path, name: str, folder: str) -> None:
    write_vtab(tmp_path / folder, LISTS, classes=37)
    data = Vtab(root=tmp_path, task=name, **SMALL)
    data.setup("fit")
    assert data.task.name == "oxford_iiit_pet"
    assert data.num_classes == 37


def test_there_are_nineteen_tasks_in_three_groups() -> None:
    groups = [task.group for task in VTAB_TASKS]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert sum(task.classes for task in VTAB_TASKS) == 940


def test_an_unknown_task_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.task: 'dsprite_loc' is unknown, did you mean 'dsprites_loc'"):
        Vtab(root=tmp_path, task="dsprite_loc")
    with pytest.raises(DataError, match=r"has no folder 'cifar' \(nor cifar100\); set data\.root"):
        Vtab(root=tmp_path, task="cifar").setup("fit")


FULL = (
    68.9, 87.7, 64.3, 97.2, 86.9, 87.4, 38.8, 79.7, 95.7, 84.2, 73.9, 56.3, 58.6, 41.7, 65.5, 57.5, 46.7, 25.7, 29.1,
)  # fmt: skip
"""Full fine-tuning in V-PETL Bench's table, in the order of the tasks."""


def test_both_means_of_vtab_are_those_of_the_published_row() -> None:
    means = vtab_means({task.name: score for task, score in zip(VTAB_TASKS, FULL, strict=True)})
    assert round(means.of_groups, 2) == 68.97
    assert round(means.of_tasks, 2) == 65.57
    assert (round(means.natural, 1), round(means.specialized, 1), round(means.structured, 1)) == (75.9, 83.4, 47.6)


def test_a_mean_needs_each_task_once() -> None:
    scores = {task.name: 1.0 for task in VTAB_TASKS}
    assert vtab_means({("pets" if name == "oxford_iiit_pet" else name): 1.0 for name in scores}).of_tasks == 1
    with pytest.raises(ConfigError, match="two scores of 'cifar', one of them as 'cifar100'"):
        vtab_means({**scores, "cifar100": 1.0})
    del scores["dtd"], scores["kitti"]
    with pytest.raises(ConfigError, match="needs all 19 tasks, there is no dtd, kitti"):
        vtab_means(scores)


@pytest.mark.parametrize(
    "content",
    [
        "a.png 0\nmy dog.png 1\n",
        "a.png 0\r\nmy dog.png 1\r\n",
        "a.png 0\nmy dog.png 1",
        "\ufeffa.png 0 \n\nmy dog.png\t1\n\n",
    ],
    ids=["plain", "crlf", "no-last-line-end", "mark-and-spaces"],
)
def test_lists_are_read_however_their_lines_end(tmp_path: Path, content: str) -> None:
    for name in ("a.png", "my dog.png"):
        picture(tmp_path / name)
    table = tmp_path / "list.txt"
    table.write_bytes(content.encode())
    items = read_list(table, tmp_path, 2)
    assert [(item.path.name, item.label) for item in items] == [("a.png", 0), ("my dog.png", 1)]


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ("a.png", r"'.*list\.txt', line 2: expected a path, a space and a whole number, found 'a\.png'"),
        ("a.png cat", r"'.*list\.txt', line 2: expected a path, a space and a whole number, found 'a\.png cat'"),
        ("a.png 1.0", r"line 2: expected a path, a space and a whole number"),
        ("a.png 1_0", r"line 2: expected a path, a space and a whole number"),
        ("a.png 2", r"'.*list\.txt', line 2: label 2 is outside 0\.\.1"),
        ("a.png -1", r"line 2: label -1 is outside 0\.\.1"),
        ("none.png 1", r"'.*list\.txt', line 2: the picture '.*none\.png' does not exist"),
        (f"{'x' * 5000}.png 1", r"line 2: the picture '.*' does not exist"),
        ("a\0.png 1", r"line 2: the picture '.*' does not exist"),
    ],
)
def test_a_wrong_line_is_refused_with_file_and_number(tmp_path: Path, second: str, sentence: str) -> None:
    picture(tmp_path / "a.png")
    table = tmp_path / "list.txt"
    table.write_text(f"a.png 0\n{second}\n", encoding="utf-8")
    with pytest.raises(DataError, match=sentence) as caught:
        read_list(table, tmp_path, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the list '.*' does not exist"),
        (b"\n \r\n", "names no pictures"),
        (b"\xff\xfe\x80 1", "as text in UTF-8"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    table = tmp_path / "list.txt"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_list(table, tmp_path, 2)


NAMES = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="/"), min_size=1).filter(
    lambda name: name == name.strip()
)


@given(st.lists(st.tuples(NAMES, st.integers(0, 999), st.sampled_from([" ", "  ", "\t"])), min_size=1))
def test_every_path_and_label_comes_back(rows: Sequence[tuple[str, int, str]]) -> None:
    for name, label, gap in rows:
        assert split_line(f"{name}{gap}{label}", "line") == (name, label)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_content_is_a_list_or_a_data_error_with_the_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "list.txt"
        table.write_bytes(content)
        with pytest.raises(DataError, match=r"list\.txt"):
            read_list(table, Path(folder) / "pictures", 3)


def write_fgvc(folder: Path, images: str, splits: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, ids in splits.items():
        for name in ids:
            picture(folder / images / name)
        (folder / f"{part}.json").write_text(json.dumps(ids), encoding="utf-8")


SPLITS: dict[str, dict[str, Any]] = {
    "train": {"b/1.jpg": 10, "a/1 1.jpg": 3, "c/1.jpg": 200},
    # By themselves, these would be 0 and 1.
    "val": {"c/2.jpg": 200, "a/2.jpg": 3},
    "test": {"b/3.jpg": 10, "c/3.jpg": "200"},
}


@pytest.mark.parametrize(
    ("dataset", "folder", "images"),
    [
        ("CUB_200_2011", "CUB_200_2011", "images"), ("nabirds", "nabirds", "images"),
        ("OxfordFlowers", "OxfordFlower", ""), ("OxfordFlower", "OxfordFlowers", ""),
        ("StanfordDogs", "StanfordDogs", "Images"), ("StanfordCars", "StanfordCars", ""),
    ],
)  # fmt: skip
def test_fgvc_reuses_the_labels_of_training(tmp_path: Path, dataset: str, folder: str, images: str) -> None:
    write_fgvc(tmp_path / folder, images, SPLITS)
    data = Fgvc(root=tmp_path, dataset=dataset, **SMALL)
    data.setup(None)
    assert data.class_names == ("3", "10", "200")
    labels = {part: [item.label for item in data.load(part).items] for part in ("train", "val", "test")}  # type: ignore[arg-type]
    assert labels == {"train": [1, 0, 2], "val": [2, 0], "test": [1, 2]}
    assert next(iter(data.train_dataloader()))["image"].shape == (3, 3, 32, 32)


def test_class_ids_are_ordered_as_numbers_or_as_text() -> None:
    assert label_order({"a": 10, "b": 9}) == ("9", "10")
    assert label_order({"a": "10", "b": "9"}) == ("10", "9")
    assert label_order({"a": 10, "b": "9", "c": "10"}) == ("10", "9")


def test_a_class_that_training_does_not_have_is_named(tmp_path: Path) -> None:
    write_fgvc(tmp_path / "nabirds", "images", {**SPLITS, "test": {"d/1.jpg": 77}})
    with pytest.raises(DataError, match=r"test\.json': 'd/1\.jpg' has the class id 77, which no training picture has"):
        Fgvc(root=tmp_path, dataset="nabirds").setup("test")


def test_a_picture_that_json_names_has_to_be_there(tmp_path: Path) -> None:
    write_fgvc(tmp_path / "nabirds", "images", SPLITS)
    (tmp_path / "nabirds/images/c/2.jpg").unlink()
    with pytest.raises(DataError, match=r"val\.json': the picture '.*c/2\.jpg' does not exist"):
        Fgvc(root=tmp_path, dataset="nabirds").setup("fit")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"a": 1,\n "b" 2}', r"train\.json', line 2: this is no JSON"),
        ("[" * 100_000, "nested too deeply|is no JSON"),
        ("[1, 2]", "must hold an object"),
        ("{}", "must hold an object"),
        ('{"a": 1.5}', r"the class id of 'a' is 1\.5, expected a number or a text"),
        ('{"a": true}', "the class id of 'a' is True"),
        ('{"a": [1]}', r"the class id of 'a' is \[1\]"),
    ],
)
def test_json_that_is_no_list_of_pictures_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    table = tmp_path / "train.json"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        read_class_ids(table)


def write_cub(folder: Path) -> None:
    for i in range(1, 5):
        picture(folder / f"images/{i % 2}/{i}.jpg")
    for name, values in {
        "images": [f"{i % 2}/{i}.jpg" for i in range(1, 5)], "image_class_labels": [2, 1, 2, 1],
        "train_test_split": [1, 1, 0, 0],
    }.items():  # fmt: skip
        lines = "".join(f"{i} {value}\n" for i, value in enumerate(values, start=1))
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")


def test_cub_is_read_as_published(tmp_path: Path) -> None:
    folder = tmp_path / "CUB_200_2011"
    write_cub(folder)
    data = Fgvc(root=tmp_path, dataset="CUB_200_2011", **SMALL)
    data.setup(None)
    for part, expected in {
        "train": [("1.jpg", 1), ("2.jpg", 0)],
        "val": [],
        "test": [("3.jpg", 1), ("4.jpg", 0)],
    }.items():
        assert [(item.path.name, item.label) for item in data.load(part).items] == expected  # type: ignore[arg-type]
    assert data.no_samples("val").startswith("CUB as published has no val pictures; put VPT's")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("image_class_labels", "1 2\n2 1\n3 2\n", r"image_class_labels\.txt' has no number for picture 4, '0/4\.jpg'"),
        ("train_test_split", "1 1\n1 0\n", r"train_test_split\.txt', line 2: expected another number and a value"),
        ("image_class_labels", "1\n", r"image_class_labels\.txt', line 1: expected another number and a value"),
        ("images", "1 none.jpg\n", r"images\.txt': the picture '.*none\.jpg' does not exist"),
    ],
)
def test_tables_of_cub_that_do_not_fit_are_refused(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    folder = tmp_path / "CUB_200_2011"
    write_cub(folder)
    (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        Fgvc(root=tmp_path, dataset="CUB_200_2011").setup("fit")


def write_few_shot(folder: Path, lists: dict[str, tuple[str, list[str]]]) -> None:
    (folder / "annotations").mkdir(parents=True)
    for name, (images, lines) in lists.items():
        for line in lines:
            picture(folder / images / line.rpartition(" ")[0])
        (folder / "annotations" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_few_shot_list_is_chosen_by_shots_and_seed(tmp_path: Path) -> None:
    write_few_shot(tmp_path / "oxford-pets", {
        "train_meta.list.num_shot_1.seed_0": ("images", ["a.jpg 0"]),
        "train_meta.list.num_shot_1.seed_2": ("images", ["my old dog.jpg 36", "b.jpg 1"]),
        "val_meta.list": ("images", ["v.jpg 0"]),
        "test_meta.list": ("images", ["t.jpg 5"]),
    })  # fmt: skip
    data = FewShot(root=tmp_path, dataset="oxford-pets", shots=1, seed=2, **SMALL)
    data.setup(None)
    assert [(item.path.name, item.label) for item in data.load("train").items] == [("my old dog.jpg", 36), ("b.jpg", 1)]
    assert [item.path.name for part in ("val", "test") for item in data.load(part).items] == ["v.jpg", "t.jpg"]
    assert data.num_classes == 37
    with pytest.raises(DataError, match=r"the list '.*train_meta\.list\.num_shot_1\.seed_1' does not exist"):
        FewShot(root=tmp_path, dataset="oxford-pets", shots=1, seed=1).setup("fit")


@pytest.mark.parametrize("name", ["standford-cars", "stanford-cars"])
def test_cars_lie_beside_their_lists_in_a_misspelt_folder(tmp_path: Path, name: str) -> None:
    write_few_shot(tmp_path / "standford-cars", {
        "train_meta.list.num_shot_4.seed_0": ("", ["cars_train/1.jpg 195"]),
        "val_meta.list": ("", ["cars_train/2.jpg 0"]),
        "test_meta.list": ("", ["cars_test/3.jpg 5"]),
    })  # fmt: skip
    data = FewShot(root=tmp_path, dataset=name, shots=4, **SMALL)
    data.setup("fit")
    assert data.load("train").items[0].path == tmp_path / "standford-cars/cars_train/1.jpg"


def test_imagenet_is_tested_on_what_it_calls_validation(tmp_path: Path) -> None:
    write_few_shot(tmp_path / "imagenet", {
        "train_meta.list.num_shot_16.seed_0": ("train", ["n01/1.jpg 999"]),
        "val_meta.list": ("val", ["v.jpg 3"]),
    })  # fmt: skip
    data = FewShot(root=tmp_path, dataset="imagenet", **SMALL)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert data.load("test").items[0].path == tmp_path / "imagenet/val/v.jpg"
    assert "has no val list" in data.no_samples("val")


def test_an_unknown_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dataset: 'food' is unknown, did you mean 'food101'"):
        FewShot(root=tmp_path, dataset="food")
    with pytest.raises(ConfigError, match=r"data\.dataset: 'CUB' is unknown"):
        Fgvc(root=tmp_path, dataset="CUB")


def test_a_task_of_vtab_is_trained_tested_and_inspected_by_commands(
    kitti: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(kitti)
    Path("run.yaml").write_text(
        "backbone: {name: vit, weights: random, model: nano}\nmethod: {name: bitfit}\nhead: {name: linear}\n"
        "task: {name: classification}\n"
        "data: {name: vtab, root: ., task: kitti, resolution: 32, batch_size: 4, normalize: half}\n"
        "trainer: {max_epochs: 1, accelerator: cpu}\n",
        encoding="utf-8",
    )
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 0
    assert "test/accuracy" in json.loads(Path("run/metrics.json").read_text())
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", "kitti/images/test", "--out", "p"]) == 0
    assert main(["inspect", "--config", "run.yaml", "--data.root=elsewhere"]) == 0
    assert main(["fit", "--config", "run.yaml", "--data.train=train800val200", "--out", "whole"]) == 0
    assert main(["validate", "--adapter", "whole/adapter.safetensors"]) == 2
    assert "which leaves no val pictures; set it to train800" in capsys.readouterr().err
    capsys.readouterr()
    (kitti / "kitti/test.txt").write_text("images/test/000000.jpg 4\n", encoding="utf-8")
    assert main(["fit", "--config", "run.yaml", "--out", "other"]) == 2
    assert "test.txt', line 1: label 4 is outside 0..3" in capsys.readouterr().err
