"""Readers on good and bad files, and the data modules on top of them."""

import pytest
import torch

from peft_modal.errors import DataError
from peft_modal_timeseries.data import Archive, Folder, Signals
from peft_modal_timeseries.readers import read_series
from peft_modal_timeseries.signals import DOWNSTREAM, PRETRAIN

TS = """\
# A comment.
@problemName Toy
@timeStamps false
@univariate false
@dimensions 2
@classLabel true up down

@data
1,2,3:4,5,6:up
3,2,1:6,5,4:down
3,2,1,0:6,5,4,3:down
"""
TSV = "1\t0.5\t1.5\t2.5\n2\t2.5\t1.5\tNaN\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_ts_gives_channels_and_classes_and_lengths_may_differ(tmp_path):
    records = read_series(write(tmp_path / "Toy_TRAIN.ts", TS))
    assert [record.label for record in records] == ["up", "down", "down"]
    assert records[0].values.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert records[2].values.shape == (2, 4)


def test_tsv_drops_what_fills_up_shorter_series(tmp_path):
    records = read_series(write(tmp_path / "Toy_TRAIN.tsv", TSV))
    assert [(record.label, record.values.tolist()) for record in records] == [
        ("1", [[0.5, 1.5, 2.5]]),
        ("2", [[2.5, 1.5]]),
    ]


@pytest.mark.parametrize("header", ["", "left,right\n"])
def test_csv_has_a_row_per_step_and_a_column_per_channel(tmp_path, header):
    (record,) = read_series(write(tmp_path / "one.csv", header + "1,4\n2,5\n3,6\n"))
    assert record.values.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.ts", TS.replace("5,6:up", "5,?:up"), "line 9: value 3 is missing"),
        ("a.ts", TS.replace("5,6:up", "5,six:up"), "line 9: value 3 is 'six', expected a number"),
        ("a.ts", TS.replace("5,6:up", "5:up"), "line 9: its channels have 2 and 3 values"),
        ("a.ts", TS.replace("3,2,1:6,5,4:down", "3,2,1:down"), "holds series of 1 and 2 channels"),
        ("a.ts", TS.replace("@timeStamps false", "@timeStamps true"), "line 3: @timeStamps is true"),
        ("a.ts", TS.replace("@data\n", ""), "line 8: expected a header line"),
        ("a.ts", TS.replace("@classLabel true up down\n", ""), "has no line '@classLabel true"),
        ("a.ts", "@problemName Toy\n", "has no line '@data'"),
        ("a.ts", TS.partition("1,2,3")[0], "holds no series"),
        ("a.tsv", "1\t0.5\tNaN\t2.5\n", "line 1: value 2 is missing"),
        ("a.tsv", "1\tNaN\n", "line 1: expected a class and values, separated by tabs"),
        ("a.tsv", "1\t0.5\n", "needs at least 2 values, this one has 1"),
        ("a.tsv", "1\t0.5\t1e39\n", "too large for float32"),
        ("a.csv", "1,2\n3\n", "line 2: 1 columns, the first row has 2"),
        ("a.csv", "", "holds no series"),
        ("a.wav", "", "is no file of time series"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, text, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        read_series(write(tmp_path / name, text))
    assert name in str(caught.value)


def test_binary_content_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="cannot be read"):
        read_series(tmp_path / "a.csv")


def archive(root, suffix=".ts"):
    lines = [f"{i}.0,1.0,2.0,{i}.5:{'ab'[i % 2]}" for i in range(10)]
    header = "@problemName Toy\n@classLabel true a b\n@data\n"
    for part in ("TRAIN", "TEST"):
        write(root / f"Toy_{part}{suffix}", header + "\n".join(lines) + "\n")
    return root


def test_an_archive_gives_all_splits(tmp_path):
    data = Archive(root=archive(tmp_path / "Toy"), length=8, batch_size=4)
    data.setup()
    assert data.class_names == ("a", "b")
    sizes = [sum(len(batch["label"]) for batch in loader) for loader in (data.val_dataloader(), data.test_dataloader())]
    assert sizes == [2, 10]
    batch = next(iter(data.train_dataloader()))
    assert batch["series"].shape == (4, 1, 8)


def test_an_archive_is_normalised_by_channel(tmp_path):
    data = Archive(root=archive(tmp_path / "Toy"), length=8)
    data.setup("test")
    series = next(iter(data.test_dataloader()))["series"]
    torch.testing.assert_close(series.mean(-1), torch.zeros(10, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(series.std(-1, correction=0), torch.ones(10, 1))


def test_an_archive_without_a_test_file_is_refused(tmp_path):
    (archive(tmp_path / "Toy") / "Toy_TEST.ts").unlink()
    data = Archive(root=tmp_path / "Toy")
    with pytest.raises(DataError, match=r"has no partner 'Toy_TEST\.ts'"):
        data.setup("test")


def test_a_folder_that_is_no_archive_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected one NAME_TRAIN\.ts or NAME_TRAIN\.tsv, found no such file"):
        Archive(root=tmp_path).setup("fit")


def test_a_test_class_that_was_never_trained_is_refused(tmp_path):
    root = archive(tmp_path / "Toy")
    test = root / "Toy_TEST.ts"
    test.write_text(test.read_text().replace(":b", ":c"))
    with pytest.raises(DataError, match="class 'c' occurs in no training series"):
        Archive(root=root).setup("test")


def test_a_folder_of_csv_files_is_read_by_class(tmp_path):
    for name in ("calm", "wild"):
        for index in range(5):
            write(tmp_path / "own" / name / f"{index}.csv", f"0,1\n{index},2\n1,3\n")
    data = Folder(root=tmp_path / "own", length=8)
    data.setup("fit")
    assert data.class_names == ("calm", "wild")
    assert next(iter(data.train_dataloader()))["series"].shape[1:] == (2, 8)


def test_files_to_predict_on_are_named_one_by_one(tmp_path):
    archive(tmp_path / "Toy")
    write(tmp_path / "Toy" / "one.csv", "1\n2\n3\n")
    names, batches = Archive(root="unused", length=8).predict_items(tmp_path / "Toy")
    short = [str(name).rpartition("/")[2] for name in names]
    assert short[9:12] == ["Toy_TEST.ts#10", "Toy_TRAIN.ts#1", "Toy_TRAIN.ts#2"]
    assert sum(len(batch["series"]) for batch in batches) == len(names) == 21


def test_signals_follow_from_the_seed_and_the_test_set_from_nothing():
    one, same, other = (Signals(seed=seed, shots=2, val_per_class=1, test_per_class=1) for seed in (0, 0, 1))
    for data in (one, same, other):
        data.setup()
    first, again, different = (next(iter(data.train_dataloader())) for data in (one, same, other))
    assert torch.equal(first["series"], again["series"])
    assert not torch.equal(first["series"], different["series"])
    tests = [next(iter(data.test_dataloader()))["series"] for data in (one, other)]
    assert torch.equal(*tests)


def test_the_families_to_learn_from_first_are_others():
    assert not set(DOWNSTREAM) & set(PRETRAIN)
