"""Readers of the benchmarks' layouts, and result files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from tracking_trees import (
    box_lines,
    places,
    write_frames,
    write_got10k,
    write_lasot,
    write_otb,
    write_own,
    write_trackingnet,
)

from peft_modal.errors import DataError
from peft_modal_tracking.files import OTB, Folder, GOT10k, LaSOT, TrackingNet
from peft_modal_tracking.layouts import find_sequences, otb_sequences, read_boxes
from peft_modal_tracking.results import write_results
from peft_modal_tracking.sequences import Video
from peft_modal_tracking.tracker import Track


def drawn_boxes(video: Video) -> torch.Tensor:
    """Where the square really is in every frame."""
    out = []
    for frame in video.frames:
        rows, columns = (frame[0] > 128).nonzero(as_tuple=True)
        x, y = int(columns.min()), int(rows.min())
        out.append([x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y])
    return torch.tensor(out).float()


def test_got10k(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_got10k(tmp_path / "train" / name, cover="8084")
    write_got10k(tmp_path / "train" / "unlisted")
    (tmp_path / "train" / "list.txt").write_text("b\na\n")
    write_got10k(tmp_path / "test" / "t", first_only=True)
    (tmp_path / "val").mkdir()
    found = find_sequences(tmp_path, "got10k", "train")
    assert [video.name for video in found] == ["b", "a"]
    assert torch.equal(found[0].boxes, drawn_boxes(found[0]))
    assert found[0].visible.tolist() == [True, False, True, True]
    (blind,) = find_sequences(tmp_path, "got10k", "test")
    assert blind.boxes.shape == (1, 4)
    assert not blind.has_truth
    assert len(blind) == 4


def test_lasot_counts_from_one(tmp_path: Path) -> None:
    write_lasot(tmp_path / "cat" / "cat-1", hidden="0100", outside="0010")
    write_lasot(tmp_path / "monkey" / "monkey-17", extra=2)
    (tmp_path / "training_set.txt").write_text("cat-1\n")
    (tmp_path / "testing_set.txt").write_text("monkey-17\n")
    (cat,) = find_sequences(tmp_path, "lasot", "train")
    assert torch.equal(cat.boxes, drawn_boxes(cat))
    assert cat.visible.tolist() == [True, False, False, True]
    assert cat.rules == "lasot"
    (monkey,) = find_sequences(tmp_path, "lasot", "test")
    assert len(monkey) == len(monkey.boxes) == 4
    assert find_sequences(tmp_path, "lasot", "val") == []
    assert len(find_sequences(tmp_path, "lasot")) == 2


def test_trackingnet_sorts_by_number_and_takes_names_as_they_are(tmp_path: Path) -> None:
    write_trackingnet(tmp_path / "TRAIN_0", "-a_0")
    write_trackingnet(tmp_path / "TRAIN_11", "b")
    write_trackingnet(tmp_path / "TRAIN_2", "c")
    write_trackingnet(tmp_path / "TEST", "t", first_only=True)
    found = find_sequences(tmp_path, "trackingnet", "train")
    assert [video.name for video in found] == ["-a_0", "c", "b"]
    assert torch.equal(found[0].boxes, drawn_boxes(found[0])), "10.png does not come before 2.png"
    assert [video.name for video in find_sequences(tmp_path, "trackingnet", "test")] == ["t"]


@pytest.mark.parametrize("delimiter", [",", "\t", "   "])
def test_otb_reads_every_delimiter(tmp_path: Path, delimiter: str) -> None:
    write_otb(tmp_path / "Basketball", range(1, 5), delimiter=delimiter)
    (video,) = find_sequences(tmp_path, "otb", "test")
    assert torch.equal(video.boxes, drawn_boxes(video))
    assert find_sequences(tmp_path, "otb", "train") == []


def test_otb_has_sequences_of_two_targets_and_of_other_ends(tmp_path: Path) -> None:
    both = {"groundtruth_rect.1.txt": box_lines(4), "groundtruth_rect.2.txt": box_lines(4, shift=1)}
    write_otb(tmp_path / "Jogging", range(1, 5), both)
    write_otb(tmp_path / "Human4", range(1, 5), {"groundtruth_rect.1.txt": "", "groundtruth_rect.2.txt": box_lines(4)})
    write_otb(tmp_path / "David", range(298, 304), {"groundtruth_rect.txt": box_lines(4)})
    assert [video.name for video in otb_sequences(tmp_path / "Jogging")] == ["Jogging_1", "Jogging_2"]
    assert [video.name for video in otb_sequences(tmp_path / "Human4")] == ["Human4"]
    (david,) = otb_sequences(tmp_path / "David")
    assert drawn_boxes(david)[0].tolist()[:2] == [*map(float, places(6)[2])], "frame 300 is the third file"


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    write_own(tmp_path / "b", count=11)
    write_own(tmp_path / "a", absent="0010")
    found = find_sequences(tmp_path, "folder", "train")
    assert [video.name for video in found] == ["a", "b"]
    assert torch.equal(found[1].boxes, drawn_boxes(found[1]))
    assert found[0].visible.tolist() == [True, True, False, True]
    assert find_sequences(tmp_path, "folder", "test") == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,2,3\n", "four numbers"),
        ("", "four numbers"),
        ("1,2,3,4\n1,2\n", "cannot be read as numbers"),
        ("1,2,3,x\n", "cannot be read as numbers"),
    ],
)
def test_damaged_boxes_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "groundtruth.txt").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_boxes(tmp_path / "groundtruth.txt")


def test_a_sequence_with_too_few_boxes_is_refused_by_name(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", [f"{i}.png" for i in range(5)])
    (tmp_path / "a" / "groundtruth.txt").write_text(box_lines(3))
    with pytest.raises(DataError, match=r"a': sequence 'a' has 5 frames and 3 boxes"):
        find_sequences(tmp_path, "folder")
    with pytest.raises(DataError, match="is not a folder"):
        find_sequences(tmp_path / "missing", "folder")
    with pytest.raises(DataError, match="has no sequences of layout 'otb'"):
        find_sequences(tmp_path, "otb")


def test_frames_are_listed_when_they_are_read(tmp_path: Path) -> None:
    write_got10k(tmp_path / "train" / "a", count=4)
    (tmp_path / "train" / "a" / "00000003.png").unlink()
    (video,) = find_sequences(tmp_path, "got10k", "train")
    assert len(video) == 4
    with pytest.raises(DataError, match="a' has 3 frames and 4 boxes"):
        video.frames[0]


def test_splits_are_held_out_and_tested_on(tmp_path: Path) -> None:
    for i in range(10):
        write_own(tmp_path / f"s{i}", count=2)
    data = Folder(root=tmp_path, val_share=0.2)
    parts = {part: {video.name for video in data.load(part)} for part in ("train", "val", "test")}
    assert len(parts["train"]) == 8
    assert parts["val"] == parts["test"]
    assert not parts["train"] & parts["val"]
    assert {video.name for video in Folder(root=tmp_path, val_share=0.2, seed=1).load("val")} != parts["val"]


def test_data_modules_know_their_layout(tmp_path: Path) -> None:
    write_got10k(tmp_path / "g" / "train" / "a")
    write_got10k(tmp_path / "g" / "val" / "b")
    got10k = GOT10k(root=tmp_path / "g")
    assert [video.name for part in ("train", "val") for video in got10k.load(part)] == ["a", "b"]
    write_lasot(tmp_path / "l" / "cat" / "cat-1")
    assert [video.name for video in LaSOT(root=tmp_path / "l").load("train")] == ["cat-1"]
    write_trackingnet(tmp_path / "t" / "TRAIN_0", "a", count=3)
    assert [video.name for video in TrackingNet(root=tmp_path / "t").load("train")] == ["a"]
    write_otb(tmp_path / "o" / "Dog", range(1, 4))
    assert [video.name for video in OTB(root=tmp_path / "o").load("test")] == ["Dog"]
    with pytest.raises(DataError, match="OTB is a benchmark to test on"):
        OTB(root=tmp_path / "o").load("train")


def tracks() -> dict[str, Track]:
    boxes = torch.tensor([[1.5, 2.25, 10.0, 20.0], [2.0, 3.0, 4.4, 5.0]])
    return {"s-1": Track(boxes, torch.ones(2), torch.tensor([0.5, 0.25], dtype=torch.float64))}


@pytest.mark.parametrize(
    ("form", "path", "first"),
    [
        ("got10k", "lorat/s-1/s-1_001.txt", "1.0000,2.0000,11.0000,21.0000"),
        ("lasot", "lorat_tracking_result/s-1.txt", "2.500,3.250,10.000,20.000"),
        ("otb", "results/OTB2015/lorat/s-1.txt", "1.500,2.250,10.000,20.000"),
        ("pytracking", "lorat/s-1.txt", "1.500\t2.250\t10.000\t20.000"),
    ],
)
def test_result_files_have_a_line_for_every_frame(tmp_path: Path, form: str, path: str, first: str) -> None:
    write_results(tmp_path, tracks(), form)  # type: ignore[arg-type]
    found = (tmp_path / path).read_text().splitlines()
    assert found[0] == first
    assert len(found) == 2


def test_got10k_wants_times_and_trackingnet_an_archive(tmp_path: Path) -> None:
    write_results(tmp_path, tracks(), "got10k")
    assert (tmp_path / "lorat" / "s-1" / "s-1_time.txt").read_text() == "0.50000000\n0.25000000\n"
    (path,) = write_results(tmp_path, tracks(), "trackingnet")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["s-1.txt"]
        assert archive.read("s-1.txt").decode().splitlines()[1] == "2.00,3.00,5.00,5.00"
    before = path.read_bytes()
    write_results(tmp_path, tracks(), "trackingnet")
    assert path.read_bytes() == before
