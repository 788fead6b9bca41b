from pathlib import Path

import pytest

from peft_modal.data.folder import FolderIndex, Item, list_files, scan_folder
from peft_modal.errors import ConfigError, DataError

SUFFIXES = (".ply", ".txt")


def fill(folder: Path, count: int, ending: str = ".ply") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:02d}{ending}").touch()


def names(items: tuple[Item, ...]) -> set[str]:
    return {item.path.name for item in items}


def scan(root: Path, **options) -> FolderIndex:
    return scan_folder(root, suffixes=SUFFIXES, **options)


@pytest.fixture
def flat(tmp_path) -> Path:
    fill(tmp_path / "data" / "mug", 20)
    fill(tmp_path / "data" / "chair", 10)
    return tmp_path / "data"


@pytest.fixture
def split(tmp_path) -> Path:
    for part, count in (("train", 10), ("val", 3), ("test", 4)):
        for name in ("mug", "chair"):
            fill(tmp_path / "data" / part / name, count)
    return tmp_path / "data"


def test_classes_are_sorted_by_name_and_labels_point_into_them(flat):
    index = scan(flat)
    assert index.class_names == ("chair", "mug")
    for item in index.train + index.val + index.test:
        assert index.class_names[item.label] == item.path.parent.name


def test_each_class_gives_its_share_and_no_file_is_lost_or_used_twice(flat):
    index = scan(flat, val_share=0.1, test_share=0.2)
    for label, val, test in ((0, 1, 2), (1, 2, 4)):
        assert sum(i.label == label for i in index.val) == val
        assert sum(i.label == label for i in index.test) == test
    paths = [i.path for i in index.train + index.val + index.test]
    assert len(paths) == len(set(paths)) == 30


def test_the_seed_fixes_the_split(flat):
    assert scan(flat, seed=1) == scan(flat, seed=1)
    assert scan(flat, seed=1).test != scan(flat, seed=2).test


def test_another_class_or_another_place_does_not_change_the_split_of_a_class(flat, tmp_path):
    before = {i.path.name for i in scan(flat).test if i.path.parent.name == "mug"}
    fill(flat / "bin", 10)
    moved = flat.rename(tmp_path / "elsewhere")
    assert {i.path.name for i in scan(moved).test if i.path.parent.name == "mug"} == before


def test_split_folders_are_taken_as_they_are(split):
    index = scan(split)
    assert (len(index.train), len(index.val), len(index.test)) == (20, 6, 8)
    assert all(i.path.parts[-3] == "val" for i in index.val)


def test_without_val_a_share_of_train_is_held_out_and_test_stays_whole(split):
    for path in (split / "val").rglob("*.ply"):
        path.unlink()
    for folder in ("mug", "chair"):
        (split / "val" / folder).rmdir()
    (split / "val").rmdir()
    index = scan(split, val_share=0.2)
    assert (len(index.train), len(index.val), len(index.test)) == (16, 4, 8)
    assert all(i.path.parts[-3] == "train" for i in index.val)
    assert not {i.path for i in index.val} & {i.path for i in index.train}


def test_a_share_of_zero_holds_nothing_out(flat):
    index = scan(flat, val_share=0.0, test_share=0.0)
    assert (len(index.train), index.val, index.test) == (30, (), ())


def test_a_small_share_still_holds_out_one_file(flat):
    index = scan(flat, val_share=0.01, test_share=0.01)
    assert [i.label for i in index.val] == [0, 1]


def test_files_lie_at_any_depth_and_endings_in_any_case(tmp_path):
    fill(tmp_path / "cat" / "a" / "b", 3, ".PLY")
    fill(tmp_path / "cat", 2, ".txt")
    fill(tmp_path / "cat", 2, ".jpg")
    assert len(scan(tmp_path, val_share=0, test_share=0).train) == 5


def test_hidden_files_and_folders_are_passed_over(flat):
    fill(flat / ".cache", 3)
    fill(flat / "__MACOSX" / "mug", 3)
    (flat / "mug" / "._00.ply").touch()
    assert len(scan(flat, val_share=0, test_share=0).train) == 30


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "train", 5)
    fill(tmp_path / "car", 5)
    assert scan(tmp_path).class_names == ("car", "train")


def test_files_beside_the_class_folders_are_no_class(flat):
    (flat / "names.txt").touch()
    assert len(scan(flat, val_share=0, test_share=0).train) == 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root, "neither a folder nor a CSV file"),
        (lambda root: root.mkdir(), r"holds no \.ply or \.txt files; found no files at all"),
        (lambda root: fill(root / "cat", 3, ".jpg"), r"holds no \.ply or \.txt files; found \.jpg \(3\)"),
        (lambda root: fill(root, 3), "no folder per class"),
        (lambda root: (fill(root / "train", 3), fill(root / "test", 3)), "'.*test' has no folder per class"),
        (lambda root: (fill(root / "cat", 5), fill(root / "dog", 5, ".jpg")), r"dog' holds no .* found \.jpg \(5\)"),
        (
            lambda root: (fill(root / "cat", 5), fill(root / "dog", 2)),
            "class 'dog' has 2 files; holding out 1 for test",
        ),
        (
            lambda root: (fill(root / "train" / "cat", 5), fill(root / "test" / "dog", 5)),
            "class 'dog' occurs in test but not in train",
        ),
        (
            lambda root: (fill(root / "train" / "cat", 5), fill(root / "vall" / "cat", 5)),
            "'vall' is not one of them: did you mean 'val'",
        ),
        (lambda root: fill(root / "val" / "cat", 5), "class 'cat' occurs in val but not in train"),
    ],
    ids=["missing", "empty", "other", "loose", "no-classes", "class-other", "few", "unseen", "misspelt", "no-train"],
)
def test_a_folder_that_cannot_serve_is_refused_with_what_was_found(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        scan(tmp_path / "data")


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (1.0, 0.0), (0.5, 0.5)])
def test_shares_that_leave_nothing_to_train_on_are_refused(flat, val, test):
    with pytest.raises(ConfigError, match=f"val_share {val} and test_share {test}"):
        scan(flat, val_share=val, test_share=test)


@pytest.fixture
def table(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.ply").touch()

    def write(text: str) -> Path:
        path = tmp_path / "labels.csv"
        path.write_text(text)
        return path

    return write


def test_a_csv_names_files_relative_to_itself(table):
    index = scan(table("path,label,split\n0.ply,mug,train\n1.ply,mug,train\n2.ply,mug,val\n3.ply,mug,test\n"))
    assert index.class_names == ("mug",)
    assert [names(part) for part in (index.train, index.val, index.test)] == [{"0.ply", "1.ply"}, {"2.ply"}, {"3.ply"}]
    assert all(i.path.is_file() for i in index.train)


def test_a_csv_without_splits_is_split_by_the_seed(table):
    text = "label,path,note\n" + "".join(f"{'ab'[i % 2]}, {i}.ply,x\n" for i in range(12))
    index = scan(table(text), val_share=0.2, test_share=0.2)
    assert (len(index.train), len(index.val), len(index.test)) == (8, 2, 2)


def test_a_csv_without_val_rows_holds_a_share_of_train_out(table):
    text = "path,label,split\n" + "".join(f"{i}.ply,a,{'test' if i > 9 else 'train'}\n" for i in range(12))
    index = scan(table(text), val_share=0.2)
    assert (len(index.train), len(index.val), len(index.test)) == (8, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n0.ply,a\n", "needs the columns path,label.* found: file, label"),
        ("", "needs the columns"),
        ("path,label\n", "names no files"),
        ("path,label\n0.ply,a\nno.ply,a\n", "line 3: the file '.*no.ply' does not exist"),
        ("path,label\n0.ply,\n", "line 2: path and label must both be given"),
        ("path,label\n0.ply\n", "line 2: path and label must both be given"),
        ("path,label\nlabels.csv,a\n", r"line 2: 'labels.csv' is not a \.ply or \.txt file"),
        ("path,label\n0.ply,a\n0.ply,b\n", "line 3: '0.ply' is already named in line 2"),
        ("path,label,split\n0.ply,a,training\n", "line 2: split is 'training', expected train, val or test"),
        ("path,label,split\n0.ply,a,train\n1.ply,a,train\n2.ply,b,val\n", "class 'b' occurs in val but not in train"),
    ],
)
def test_a_csv_that_cannot_serve_is_refused_with_the_line(table, text, message):
    with pytest.raises(DataError, match=message):
        scan(table(text))


def test_a_csv_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        scan(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        scan(tmp_path / "labels.csv")


def test_list_files_gives_a_file_or_all_files_below_a_folder_sorted(flat):
    assert list_files(flat / "mug" / "00.ply", SUFFIXES) == (flat / "mug" / "00.ply",)
    files = list_files(str(flat), SUFFIXES)
    assert len(files) == 30
    assert list(files) == sorted(files)


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "does not exist"), ("empty", "found no files at all"), ("a.jpg", r"is not a \.ply or \.txt file")],
)
def test_list_files_says_what_is_wrong(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=message):
        list_files(tmp_path / name, SUFFIXES)
