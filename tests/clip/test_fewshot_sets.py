"""The sets of CoOp: lists, names and labels of the authors' layouts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from coop_trees import TREES, picture

from peft_modal.data.splits import Part
from peft_modal.errors import ConfigError, DataError
from peft_modal_clip.fewshot import FewShotSet
from peft_modal_clip.sets import SETS
from peft_modal_clip.splits import read_split, write_split

NAMES = {
    "imagenet": ("tench", "goldfish", "great white shark"),
    "caltech101": ("face", "leopard", "accordion", "airplane"),
    "oxford_pets": ("abyssinian", "american_bulldog"),
    "stanford_cars": ("2000 AM General Hummer SUV", "2012 Audi A5 Coupe"),
    "oxford_flowers": ("pink primrose", "colt's foot"),
    "food101": ("apple_pie", "ramen"),
    "fgvc_aircraft": ("DC-10", "A300B4", "Boeing 717"),
    "sun397": ("abbey", "outdoor church"),
    "dtd": ("banded", "zigzagged"),
    "eurosat": ("Annual Crop Land", "Forest", "Sea or Lake"),
    "ucf101": ("Apply_Eye_Makeup", "Yo_Yo"),
}
PER_CLASS = {
    "imagenet": (5, 0, 2), "oxford_pets": (4, 1, 3), "stanford_cars": (4, 1, 2), "fgvc_aircraft": (3, 3, 3),
    "sun397": (4, 1, 3), "ucf101": (4, 1, 3),
}  # fmt: skip
"""Pictures of each class in training, validation and test; of others half, a fifth and the rest of ten."""
TEMPLATES = {
    "oxford_pets": "a photo of a {}, a type of pet.", "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.", "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.", "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}  # fmt: skip


def everything(root: Path, dataset: str, **options: Any) -> FewShotSet:
    data = FewShotSet(root=root, dataset=dataset, **{"shots": None, "resolution": 16, **options})
    data.setup()
    return data


def labels(data: FewShotSet, part: Part) -> list[int]:
    return [item.label for item in data.load(part).items]


@pytest.mark.parametrize("dataset", NAMES)
def test_a_set_has_its_names_and_parts(tmp_path: Path, dataset: str) -> None:
    TREES[dataset](tmp_path)
    data = everything(tmp_path, dataset)
    assert data.class_names == NAMES[dataset]
    expected = PER_CLASS.get(dataset, (5, 2, 3))
    for part, count in zip(("train", "val", "test"), expected, strict=True):
        assert Counter(labels(data, part)) == (dict.fromkeys(range(len(NAMES[dataset])), count) if count else {})
    assert data.preprocessing["templates"] == [TEMPLATES.get(dataset, "a photo of a {}.")]
    paths = [item.path for part in ("train", "val", "test") for item in data.load(part).items]  # type: ignore[arg-type]
    assert len(paths) == len(set(paths))
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize(
    ("dataset", "names", "first"),
    [
        ("imagenet_v2", NAMES["imagenet"], "imagenetv2-matched-frequency-format-val/0/0_0.jpg"),
        ("imagenet_sketch", NAMES["imagenet"], "images/n01440764/n01440764_0.jpg"),
        ("imagenet_a", ("goldfish", "great white shark"), "imagenet-a/n01443537/n01443537_0.jpg"),
        ("imagenet_r", ("tench", "goldfish"), "imagenet-r/n01440764/n01440764_0.jpg"),
    ],
)
def test_variants_of_imagenet_are_for_tests_alone(
    tmp_path: Path, dataset: str, names: tuple[str, ...], first: str
) -> None:
    TREES[dataset](tmp_path)
    data = FewShotSet(root=tmp_path, dataset=dataset, resolution=16)
    data.setup("test")
    assert data.class_names == names
    assert labels(data, "test") == [label for label in range(len(names)) for _ in range(2)]
    assert data.load("test").items[0].path == tmp_path / SETS[dataset].folder / first
    with pytest.raises(ConfigError, match="is for tests alone: train on 'imagenet'"):
        data.setup("fit")


def test_pictures_of_a_list_keep_their_labels(tmp_path: Path) -> None:
    TREES["oxford_flowers"](tmp_path)
    data = everything(tmp_path, "oxford_flowers")
    # Odd pictures are of the second class: `imagelabels.mat` says 2, 1, 2, 1, ...
    for part in ("train", "val", "test"):
        for item in data.load(part).items:  # type: ignore[arg-type]
            assert item.label == int(item.path.stem[-5:]) % 2
    TREES["fgvc_aircraft"](tmp_path)
    items = everything(tmp_path, "fgvc_aircraft").load("train").items
    # The list begins with the variant of the last line of variants.txt.
    assert [item.label for item in items] == [2] * 3 + [1] * 3 + [0] * 3
    TREES["ucf101"](tmp_path)
    item = everything(tmp_path, "ucf101").load("test").items[0]
    assert item.path.relative_to(tmp_path) == Path(
        "ucf101/UCF-101-midframes/Apply_Eye_Makeup/v_ApplyEyeMakeup_g05_c01.jpg"
    )


def test_names_of_imagenet_may_lie_beside_it(tmp_path: Path) -> None:
    TREES["imagenet"](tmp_path)
    TREES["imagenet_a"](tmp_path)
    (tmp_path / "imagenet-adversarial" / "classnames.txt").unlink()
    data = FewShotSet(root=tmp_path, dataset="imagenet_a", resolution=16)
    data.setup("test")
    assert data.class_names == ("goldfish", "great white shark")


def test_a_published_split_is_used_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TREES["eurosat"](tmp_path)
    # An order that is not that of the alphabet, and a division that nobody would make.
    rows = {
        "train": [["SeaLake/SeaLake_0.jpg", 0, "Sea or Lake"], ["Forest/Forest_9.jpg", 1, "Forest"]],
        "val": [["Forest/Forest_0.jpg", 1, "Forest"]],
        "test": [["SeaLake/SeaLake_9.jpg", 0, "SeaLake"]],
    }
    path = tmp_path / "eurosat" / "split_zhou_EuroSAT.json"
    path.write_text(json.dumps(rows))
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        data = everything(tmp_path, "eurosat")
    # A folder's name in a file gets the long name, too.
    assert data.class_names == ("Sea or Lake", "Forest")
    for part in ("train", "val", "test"):
        items = data.load(part).items  # type: ignore[arg-type]
        found = [[item.path.relative_to(tmp_path / "eurosat/2750").as_posix(), item.label] for item in items]
        assert found == [row[:2] for row in rows[part]]
    assert path.read_bytes() == before
    assert "NOT the published one" not in caplog.text
    assert data.record()["published"] is True
    assert data.record()["split_sha256"] == hashlib.sha256(before).hexdigest()


def test_a_missing_split_is_made_once_and_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TREES["dtd"](tmp_path)
    path = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    with caplog.at_level(logging.WARNING):
        first = everything(tmp_path, "dtd", seed=1)
    assert "NOT the published one" in caplog.text
    written = path.read_bytes()
    assert sorted(json.loads(written)) == ["made_by", "test", "train", "val"]
    assert [entry.name for entry in path.parent.iterdir() if "tmp" in entry.name] == []
    caplog.clear()
    # More pictures change nothing any more, and it is said again whose split it is.
    picture(tmp_path / "dtd" / "images" / "banded" / "new.jpg")
    with caplog.at_level(logging.WARNING):
        second = everything(tmp_path, "dtd", seed=2)
    assert "NOT the published one" in caplog.text
    assert path.read_bytes() == written
    assert first.load("test").items == second.load("test").items
    assert second.record()["split_sha256"] == hashlib.sha256(written).hexdigest()
    assert second.record()["published"] is False


def test_the_same_files_give_the_same_split_on_another_machine(tmp_path: Path) -> None:
    made = []
    for name in ("here", "there"):
        TREES["oxford_pets"](tmp_path / name)
        everything(tmp_path / name, "oxford_pets")
        made.append((tmp_path / name / "oxford_pets" / "split_zhou_OxfordPets.json").read_bytes())
    assert made[0] == made[1]


def test_a_split_file_may_lie_elsewhere(tmp_path: Path) -> None:
    TREES["food101"](tmp_path)
    own = tmp_path / "mine.json"
    data = everything(tmp_path, "food101", split_file=own)
    assert own.is_file()
    assert not (tmp_path / "food-101" / "split_zhou_Food101.json").exists()
    again = everything(tmp_path, "food101", split_file=own)
    assert again.load("train").items == data.load("train").items
    with pytest.raises(ConfigError, match="is split by its own lists"):
        FewShotSet(root=tmp_path, dataset="imagenet", split_file=own)


def test_other_code_bases_read_what_was_written(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    everything(tmp_path, "eurosat")
    path = tmp_path / "eurosat" / "split_zhou_EuroSAT.json"
    split = read_split(path).split
    assert [row[1:] for row in json.loads(path.read_text())["train"]][:5] == [[0, "Annual Crop Land"]] * 5
    write_split(tmp_path / "again.json", split)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "must hold the lists 'train', 'val' and 'test'"),
        ("{", "this is no JSON"),
        (
            '{"train": [["a.jpg", "0", "A"]], "val": [], "test": []}',
            "train, entry 1: expected .path, label, class",
        ),
        ('{"train": [["a.jpg", 0, "A"], ["b.jpg", 0, "B"]], "val": [], "test": []}', "label 0 is both 'A' and 'B'"),
        ('{"train": [["a.jpg", 1, "A"]], "val": [], "test": []}', "no picture has the label 0"),
        ('{"train": [["a.jpg", 9999999999, "A"]], "val": [], "test": []}', "no picture has the label 0"),
        ('{"train": [], "val": [], "test": []}', "names no pictures"),
        ('{"train": [["gone.jpg", 0, "A"]], "val": [], "test": []}', "the picture '.*gone.jpg' does not exist"),
        (
            '{"train": [["Forest/Forest_0.jpg", 0, "A"]], "val": [], "test": [["Forest/Forest_1.jpg", 1, "B"]]}',
            "class 'B' has no picture to train on",
        ),
    ],
)
def test_a_split_that_cannot_serve_is_refused_in_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    TREES["eurosat"](tmp_path)
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        everything(tmp_path, "eurosat")


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("eurosat", "has no folder 'eurosat'; set data.root"),
        ("eurosat/2750", "has no folder '2750' with the pictures"),
    ],
)
def test_a_set_that_is_not_there_is_told(tmp_path: Path, missing: str, sentence: str) -> None:
    TREES["eurosat"](tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=sentence):
        everything(tmp_path, "eurosat")


def test_lists_that_are_missing_or_small_are_told(tmp_path: Path) -> None:
    TREES["stanford_cars"](tmp_path)
    (tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat").write_bytes(b"not a matrix")
    with pytest.raises(DataError, match=r"cars_meta.mat' cannot be read as a MATLAB file"):
        everything(tmp_path, "stanford_cars")
    (tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat").unlink()
    with pytest.raises(DataError, match=r"cars_meta.mat' does not exist"):
        everything(tmp_path, "stanford_cars")
    picture(tmp_path / "dtd" / "images" / "banded" / "0.jpg")
    with pytest.raises(DataError, match="class 'banded' has 1 pictures, too few to divide"):
        everything(tmp_path, "dtd")
    TREES["imagenet"](tmp_path)
    (tmp_path / "imagenet" / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"classnames.txt' does not exist: it names the classes"):
        everything(tmp_path, "imagenet")


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data.dataset: 'eurosta' is unknown, did you mean 'eurosat'"):
        FewShotSet(root=".", dataset="eurosta")


def test_the_number_of_classes_is_known_without_data() -> None:
    for name, of in SETS.items():
        assert len(FewShotSet.class_names_without_data({"dataset": name, "classes": "all"})) == of.classes
    assert len(FewShotSet.class_names_without_data({"dataset": "oxford_pets", "classes": "new"})) == 18
    assert sum(not of.is_test_only for of in SETS.values()) == 11
