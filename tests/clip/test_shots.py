"""Shots as the code of CoOp draws them, files of shots, and halves of the classes."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 — written here
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coop_trees import TREES

from peft_modal.data.pickles import read_pickle
from peft_modal.errors import ConfigError, DataError
from peft_modal_clip.fewshot import FewShotSet
from peft_modal_clip.shots import cut_classes, draw_shots, read_shots
from peft_modal_clip.splits import Entry, Split

LABELS = [2, 0, 2, 1, 0, 2, 1, 1, 0, 2, 0, 1, 2, 2]
"""Not sorted: classes come in the order 2, 0, 1."""


def split(train: list[int], val: list[int], test: list[int] = []) -> Split:  # noqa: B006
    parts = (("train", train), ("val", val), ("test", test))
    return Split(*(tuple(Entry(f"{p}/{i}.jpg", y, f"class {y}") for i, y in enumerate(found)) for p, found in parts))


def paths(entries: tuple[Entry, ...]) -> list[str]:
    return [entry.path for entry in entries]


def drawn_by_hand(labels: list[int], part: str, count: int) -> list[str]:
    """From Python's global random numbers, in the order of first appearance."""
    drawn = []
    for label in dict.fromkeys(labels):
        items = [f"{part}/{i}.jpg" for i, found in enumerate(labels) if found == label]
        drawn += random.sample(items, count) if len(items) >= count else items
    return drawn


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_shots_are_those_of_pythons_random_numbers_after_the_seed(shots: int, seed: int) -> None:
    of = split(LABELS, LABELS[::-1] * 2)
    found = draw_shots(of, shots, seed)
    random.seed(seed)
    assert paths(found.train) == drawn_by_hand(LABELS, "train", shots)
    assert paths(found.val) == drawn_by_hand(LABELS[::-1] * 2, "val", min(shots, 4))
    assert found.test == of.test


def test_the_draw_is_pinned() -> None:
    """The stream of Python's generator after seeds 1 and 2: `sample(range(10), 2)` twice each."""
    of = split([0] * 10 + [1] * 10, [])
    assert [int(p[6:-4]) for p in paths(draw_shots(of, 2, 1).train)] == [2, 1, 14, 11]
    assert [int(p[6:-4]) for p in paths(draw_shots(of, 2, 2).train)] == [0, 1, 11, 15]


def test_a_draw_leaves_global_random_numbers_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    draw_shots(split(LABELS, LABELS), 2, 1)
    assert random.random() == expected


def test_without_shots_everything_is_taken_and_small_classes_give_all() -> None:
    of = split([0, 0, 0, 1], [0, 1])
    assert draw_shots(of, None, 1) == of
    found = draw_shots(of, 2, 1)
    assert [entry.label for entry in found.train] == [0, 0, 1]
    assert [entry.label for entry in found.val] == [0, 1]


@pytest.mark.parametrize(("count", "base"), [(37, 19), (10, 5), (3, 2), (2, 1)])
def test_the_first_half_is_the_larger_one(count: int, base: int) -> None:
    names = tuple(f"class {i}" for i in range(count))
    of = split(list(range(count)), list(range(count)), list(range(count)))
    cut, kept = cut_classes(of, names, "base")
    assert [entry.label for entry in cut.train] == [entry.label for entry in cut.val] == list(range(base))
    assert cut.test == of.test
    assert kept == names
    cut, kept = cut_classes(of, names, "new")
    assert kept == names[base:]
    for part in cut:
        assert [entry.label for entry in part] == list(range(count - base))
        assert [entry.name for entry in part] == list(kept)
    assert cut_classes(of, names, "all") == (of, names)


def shown(root: Path, **options: Any) -> dict[str, Any]:
    data = FewShotSet(root=root, **{"dataset": "eurosat", "resolution": 16, **options})
    data.setup("fit")
    return data.record()


def trained_on(root: Path, **options: Any) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Names of classes, and file names with labels of training and validation pictures."""
    data = FewShotSet(root=root, dataset="eurosat", resolution=16, **options)
    data.setup("fit")
    items = [item for part in ("train", "val") for item in data.load(part).items]  # type: ignore[arg-type]
    return data.class_names, [(item.path.name, item.label) for item in items]


def test_classes_are_cut_after_the_shots_are_drawn(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    names, whole = trained_on(tmp_path, shots=2, seed=3)
    assert trained_on(tmp_path, shots=2, seed=3, classes="base") == (names, [row for row in whole if row[1] < 2])
    found, new = trained_on(tmp_path, shots=2, seed=3, classes="new")
    assert found == ("Sea or Lake",)
    assert new == [(name, 0) for name, label in whole if label == 2]
    assert len(new) == 4


def test_the_record_of_a_part_of_the_classes_serves_the_others(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    for classes in ("base", "new"):
        (tmp_path / "data.json").write_text(json.dumps(shown(tmp_path, shots=2, seed=3, classes=classes)))
        for wanted in ("all", "base", "new"):
            options = {"shots": 2, "seed": 1, "classes": wanted, "shots_file": tmp_path / "data.json"}
            assert trained_on(tmp_path, **options) == trained_on(tmp_path, shots=2, seed=3, classes=wanted)


def test_one_seed_gives_one_draw_and_three_seeds_three(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    draws = {seed: json.dumps(shown(tmp_path, shots=2, seed=seed)["train"]) for seed in (1, 2, 3)}
    assert draws[1] == json.dumps(shown(tmp_path, shots=2, seed=1)["train"])
    assert len(set(draws.values())) == 3


def test_shots_never_come_from_other_parts(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    split_file = json.loads((tmp_path / "eurosat/split_zhou_EuroSAT.json").read_text()) if shown(tmp_path) else {}
    record = shown(tmp_path, shots=4)
    for part in ("train", "val"):
        assert {row[0] for row in record[part]} <= {row[0] for row in split_file[part]}


# Files of shots.


class Datum:
    """Dassl's, as far as a pickle knows it."""

    def __init__(self, path: str, label: int, name: str) -> None:
        self._impath, self._label, self._domain, self._classname = path, label, 0, name


def pickled(rows: dict[str, list[list[Any]]], module: str, protocol: int = pickle.HIGHEST_PROTOCOL) -> bytes:
    """A pickle of the authors' code: its classes are known while it is written only."""
    kind = type("Datum", (Datum,), {"__module__": module, "__qualname__": "Datum"})
    names = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    made = {name: types.ModuleType(name) for name in names}
    made[module].Datum = kind  # type: ignore[attr-defined]
    sys.modules.update(made)
    try:
        content = {part: [kind(f"/home/zhou/data/{path}", y, name) for path, y, name in rows[part]] for part in rows}
        return pickle.dumps(content, protocol)
    finally:
        for name in made:
            del sys.modules[name]


@pytest.mark.parametrize("module", ["dassl.data.datasets.base_dataset", "datasets.utils"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_authors_pickles_give_their_shots(tmp_path: Path, module: str, protocol: int) -> None:
    TREES["eurosat"](tmp_path)
    drawn = shown(tmp_path, shots=2, seed=7)
    rows = {
        part: [[f"eurosat/2750/{path}", label, name] for path, label, name in drawn[part]] for part in ("train", "val")
    }
    file = tmp_path / "eurosat" / "split_fewshot" / "shot_2-seed_1.pkl"
    file.parent.mkdir()
    file.write_bytes(pickled(rows, module, protocol))
    # Beside the set it is taken where it may be opened, and passed over where it may not.
    found = shown(tmp_path, shots=2, seed=1, allow_pickle=True)
    assert (found["train"], found["val"]) == (drawn["train"], drawn["val"])
    assert found["shots_file"] == str(file)
    assert shown(tmp_path, shots=2, seed=1)["train"] != drawn["train"]
    # Named, it has to be allowed.
    with pytest.raises(ConfigError, match=r"data.allow_pickle: .* is a pickle"):
        shown(tmp_path, shots=2, seed=3, shots_file=file)
    named = shown(tmp_path, shots=2, seed=3, shots_file=file, allow_pickle=True)
    assert named["train"] == drawn["train"]


def test_imagenets_pickles_have_nothing_to_validate_on(tmp_path: Path) -> None:
    TREES["imagenet"](tmp_path)
    drawn = shown(tmp_path, dataset="imagenet", shots=2, seed=7)
    rows = [[f"imagenet/images/{path}", label, name] for path, label, name in drawn["train"]]
    (tmp_path / "shots.pkl").write_bytes(pickled({"train": rows}, "dassl.data.datasets.base_dataset"))
    options = {"dataset": "imagenet", "shots_file": tmp_path / "shots.pkl", "allow_pickle": True}
    found = shown(tmp_path, **options)
    assert (found["train"], found["val"]) == (drawn["train"], [])


def test_another_runs_record_gives_its_shots(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    drawn = shown(tmp_path, shots=2, seed=7)
    (tmp_path / "data.json").write_text(json.dumps(drawn))
    assert shown(tmp_path, shots=2, seed=1, shots_file=tmp_path / "data.json")["train"] == drawn["train"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (pickle.dumps({"train": [np.zeros(2)], "val": []}), "holds no list 'train' of pictures"),
        (pickle.dumps([1]), "holds no list 'train' of pictures"),
        (pickle.dumps(print), "holds an object of builtins.print"),
        (b"", "cannot be read as a pickle"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "shots.pkl").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_shots(tmp_path / "shots.pkl", split([0], [0]), allow_pickle=True)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (["train/9.jpg", 0, "class 0"], "it is not in the split"),
        (["train/0.jpg", 1, "class 1"], "its label is 0 in the split"),
        (["test/0.jpg", 0, "class 0"], "it is not in the split"),
    ],
)
def test_shots_of_another_split_are_refused(tmp_path: Path, row: list[Any], sentence: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"train": [row], "val": []}))
    with pytest.raises(DataError, match=sentence):
        read_shots(tmp_path / "data.json", split([0, 0], [0], [0]), allow_pickle=False)


@pytest.mark.parametrize(
    "program",
    [
        b"cdatasets.utils\nDatum\n(dS'_impath'\nS'x'\nsb.",  # sets the state of the class instead of an object's
        b"cdatasets.utils\nDatum\n(S'x'\ntR.",  # calls it with an argument
        b"cdatasets.utils\nDatum\n.",  # is the class
    ],
)
def test_an_object_of_a_pickle_is_never_of_its_class(tmp_path: Path, program: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(DataError):
        read_pickle(tmp_path / "a.pkl", allowed=True, records=("datasets.utils.Datum",))
