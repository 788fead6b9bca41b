"""The inference loop: videos side by side, files, and what cannot be followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from tracking_trees import square, write_frames, write_lasot

from peft_modal.__main__ import main
from peft_modal.anatomy import Features
from peft_modal.errors import ConfigError, DataError
from peft_modal_heads.tracking_mlp import TrackingMLP, TrackingOutput
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.predicting import parse_box
from peft_modal_tracking.sequences import FrameFiles, StoredFrames, Video
from peft_modal_tracking.steps import CropSettings
from peft_modal_tracking.tracker import Tracker
from peft_modal_tracking.video_files import VideoFile, drawn, frame_files, open_video, write_video

SETTINGS = CropSettings((8, 8), (12, 16))


def tracker(**options: Any) -> Tracker:
    torch.manual_seed(0)
    backbone = LoRAT.tiny()
    return Tracker(backbone, TrackingMLP(backbone.feature_spec(), init_std=0.3), SETTINGS, **options)


def moving(frames: int, seed: int = 0) -> Video:
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(frames, 3, 40, 48, generator=generator) * 60).to(torch.uint8)
    boxes = []
    for i in range(frames):
        pixels[i, :, 10 + i % 9 : 18 + i % 9, 12 + i % 7 : 22 + i % 7] = 250
        boxes.append([12.0 + i % 7, 10 + i % 9, 10, 8])
    return Video(f"v{seed}", StoredFrames(pixels), torch.tensor(boxes))


def test_videos_side_by_side_are_followed_as_if_alone() -> None:
    made = tracker()
    videos = [moving(5, 0), moving(2, 1), moving(9, 2), moving(1, 3), moving(4, 4)]
    together = made.track_all(videos, at_once=2)
    for video, found in zip(videos, together, strict=True):
        alone = made.track(video)
        assert found.boxes.shape == (len(video), 4)
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-5)
        assert torch.equal(found.boxes[0], video.boxes[0])
        assert found.seconds.shape == (len(video),)


def test_no_more_videos_than_asked_for_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    made, counts = tracker(), []
    step = made._step
    monkeypatch.setattr(made, "_step", lambda runs: (counts.append(len(runs)), step(runs)))
    made.track_all([moving(4, seed) for seed in range(5)], at_once=2)
    assert set(counts) == {1, 2}


class _Oracle(nn.Module):
    """Finds the bright square: the head's output is made of the search picture itself."""

    def __init__(self) -> None:
        super().__init__()
        self.searches: list[Tensor] = []

    def forward(self, features: Features) -> TrackingOutput:
        search = self.searches.pop()
        count, _, height, width = search.shape
        scores = torch.full((count, 3, 4), -5.0)
        boxes = torch.zeros(count, 3, 4, 4)
        for i, picture in enumerate(search):
            rows, columns = (picture[0] > 0).nonzero(as_tuple=True)
            x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            boxes[i] = torch.tensor([x1 / width, y1 / height, x2 / width, y2 / height])
            scores[i, 1, 2] = 5.0
        return TrackingOutput(scores, boxes)


def test_a_perfect_network_makes_a_perfect_track() -> None:
    """Crops, snapping and the way back lose less than two pixels of the frame over many steps."""
    made = tracker()
    oracle = _Oracle()
    made.head = oracle
    made.backbone.register_forward_pre_hook(lambda _, args: oracle.searches.append(args[0]["search"]))
    video = moving(20)
    found = made.track(video)
    assert float((found.boxes - video.boxes).abs().max()) < 4.5
    assert float((found.boxes - video.boxes).abs().mean()) < 1.5
    assert float(found.scores[1:].min()) == pytest.approx(0.9933, abs=1e-3), "without the window"


def test_modes_are_left_as_they_were() -> None:
    made = tracker()
    made.backbone.train()
    made.head.train()
    made.track(moving(2))
    assert made.backbone.training
    assert made.head.training


def test_frames_may_change_in_size(tmp_path: Path) -> None:
    paths = []
    for i, size in enumerate([(48, 40), (64, 64), (30, 36)]):
        paths.append(tmp_path / f"{i}.png")
        square(10, 10).resize(size).save(paths[-1])
    video = Video("v", FrameFiles(paths), torch.tensor([[10.0, 10, 8, 6]]))
    boxes = tracker().track(video).boxes
    assert boxes.shape == (3, 4)
    assert float(boxes[2, 0] + boxes[2, 2]) <= 30
    assert float(boxes[2, 1] + boxes[2, 3]) <= 36


def test_a_video_of_one_frame_gives_the_box_back() -> None:
    found = tracker().track(moving(1))
    assert found.boxes.tolist() == [[12, 10, 10, 8]]
    assert found.frames_per_second == 0.0


@pytest.mark.parametrize(
    ("video", "box", "sentence"),
    [
        (moving(3), [5, 5, 0, 4], "has no area"),
        (moving(3), [100, 100, 5, 5], "lies outside of the frame of 48 x 40 pixels"),
        (moving(3), [5, 5, 4], "four numbers"),
        (torch.zeros(3, 3, 20, 20), None, "needs a box"),
        (torch.zeros(3, 20, 20), [1, 1, 5, 5], r"frames are \(T, 3, H, W\)"),
        (torch.zeros(0, 3, 20, 20), [1, 1, 5, 5], "the video has no frames"),
        ("nowhere.mp4", [1, 1, 5, 5], "'nowhere.mp4' is neither a video file nor a folder"),
    ],
)
def test_what_cannot_be_followed_is_refused(video: Any, box: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        tracker().track(video, box)
    with pytest.raises(DataError, match="1 videos and 0 boxes"):
        tracker().track_all([video], [])


def test_a_corrupt_frame_is_named(tmp_path: Path) -> None:
    write_frames(tmp_path, [f"{i}.png" for i in range(3)])
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"2\.png' is damaged"):
        tracker().track(tmp_path, [5, 8, 8, 6])


def test_frames_are_sorted_by_number(tmp_path: Path) -> None:
    write_frames(tmp_path, [f"f{i}.png" for i in (2, 10, 1)])
    assert [path.stem for path in frame_files(tmp_path)] == ["f1", "f2", "f10"]
    with pytest.raises(DataError, match="has no frames"):
        frame_files(tmp_path.parent)


def test_a_drawn_box_stays_inside_and_leaves_the_frame_alone() -> None:
    frame = torch.zeros(3, 20, 30, dtype=torch.uint8)
    out = drawn(frame, torch.tensor([-5.0, 4, 15, 30]))
    assert not bool(frame.any())
    assert out[:, 4, 5].tolist() == [57, 255, 20]
    assert out[:, 10, 9].tolist() == [57, 255, 20]
    assert not bool(out[:, 5:, 11:].any())


def test_videos_are_written_and_read(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = torch.zeros(5, 3, 41, 60, dtype=torch.uint8)
    for i in range(5):
        frames[i, :, :, 10 * i : 10 * i + 20] = 200
    assert write_video(tmp_path / "clip.mp4", frames, rate=10) == 5
    read = open_video(tmp_path / "clip.mp4")
    assert isinstance(read, VideoFile)
    assert (len(read), read.size(0), read.rate) == (5, (40, 60), 10)
    for i, frame in enumerate(read):
        assert float((frame.float() - frames[i, :, :40].float()).abs().mean()) < 12
    assert torch.equal(read[3], list(read)[3])
    with pytest.raises(IndexError):
        read[5]


def test_a_damaged_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(DataError, match=r"text\.mp4' cannot be read as a video"):
        open_video(tmp_path / "text.mp4")
    with pytest.raises(DataError, match="there is no frame to write"):
        write_video(tmp_path / "empty.mp4", [])
    assert not (tmp_path / "empty.mp4").exists()


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "", "1,2,3,4,5"])
def test_a_box_is_four_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--box: '.*' is no box"):
        parse_box(text)


FIT = [
    "fit", "--config=tracking_lorat.yaml", "--data.videos=4", "--data.val_videos=2", "--data.test_videos=3",
    "--data.frames=8", "--data.frame_size=[48,64]", "--data.pairs=32", "--data.batch_size=8", "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1", "--method.rank=2", "--trainer.accelerator=cpu", "--out=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run in it."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PEFT_MODAL_CACHE", str(folder / "cache"))
        assert main(FIT) == 0
    return folder


def test_a_run_leaves_figures_and_a_report(run: Path) -> None:
    figures = json.loads((run / "run" / "metrics.json").read_text())
    for part in ("val", "test"):
        for name in ("success_auc", "precision", "normalised_precision", "ao", "sr50", "sr75"):
            assert 0 <= figures[f"{part}/{name}"] <= 1
    assert figures["time/frames_per_second"] > 0
    assert figures["params/backbone_trained"] == 3 * 128
    report = json.loads((run / "run" / "report.json").read_text())
    charts = report["sections"]["tracking"]["blocks"][0]["blocks"]
    (curve,) = charts[0]["data"]["series"].values()
    assert len(curve) == 21
    assert sum(value for _, value in curve) / 21 == pytest.approx(figures["test/success_auc"], abs=1e-6)
    page = (run / "run" / "report.html").read_text()
    assert "Without pictures" not in page
    assert "renderer" not in page
    assert page.count("data:image/png") >= 8


def test_a_loaded_tracker_is_merged_and_follows_as_before(run: Path) -> None:
    path = run / "run" / "adapter.safetensors"
    merged, plain = Tracker.load(path), Tracker.load(path, merge=False)
    assert not merged.backbone.adapters
    assert plain.backbone.adapters
    assert merged.settings.search_size == (64, 64)
    video = moving(5)
    torch.testing.assert_close(merged.track(video).boxes, plain.track(video).boxes, rtol=0, atol=0.05)


def test_test_repeats_the_figures_of_fit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(run / "cache"))
    assert main(["test", "--adapter=run/adapter.safetensors", "--out=tested"]) == 0
    ours, theirs = (json.loads((run / name / "metrics.json").read_text()) for name in ("tested", "run"))
    assert ours["test/success_auc"] == pytest.approx(theirs["test/success_auc"], abs=1e-6)


def test_predict_follows_a_folder_and_a_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(run)
    write_frames(run / "frames", [f"{i}.png" for i in range(4)])
    command = ["predict", "--adapter=run/adapter.safetensors", "--box=5,8,8,6"]
    assert main([*command, "--input=frames", "--out=found", "--results=got10k"]) == 0
    lines = (run / "found" / "boxes" / "frames.txt").read_text().splitlines()
    assert lines[0] == "5.000,8.000,8.000,6.000"
    assert len(lines) == 4
    assert len((run / "found" / "lorat" / "frames" / "frames_001.txt").read_text().splitlines()) == 4
    assert len(VideoFile(run / "found" / "frames.mp4")) == 4
    assert main([*command, "--input=found/frames.mp4", "--out=again"]) == 0
    assert len(VideoFile(run / "again" / "frames.mp4")) == 4


def test_predict_follows_all_sequences_of_a_benchmark(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for name in ("cat-1", "dog-2"):
        write_lasot(run / "lasot" / name.partition("-")[0] / name)
    command = ["predict", "--adapter=run/adapter.safetensors", "--input=lasot", "--layout=lasot", "--results=lasot"]
    assert main([*command, "--out=bench"]) == 0
    lines = (run / "bench" / "lorat_tracking_result" / "dog-2.txt").read_text().splitlines()
    assert lines[0] == "6.000,9.000,8.000,6.000", "counted from 1 again"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "--input PATH is missing"),
        (["--input=x"], "either --box X,Y,W,H for one video, or --layout NAME"),
        (["--input=x", "--box=1,2,3,4", "--layout=otb"], "either --box"),
        (["--input=x", "--box=1,2"], "'1,2' is no box"),
        (["--input=x", "--layout=votb"], "--layout: 'votb' is unknown; did you mean 'otb'"),
        (["--input=x", "--box=1,2,3,4"], "'x' is neither a video file nor a folder of frames"),
    ],
)
def test_what_predict_cannot_do_is_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(run)
    assert main(["predict", "--adapter=run/adapter.safetensors", "--out=none", *more]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told


def test_a_first_box_outside_is_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(run)
    (run / "small").mkdir()
    Image.new("RGB", (30, 20)).save(run / "small" / "0.png")
    command = ["predict", "--adapter=run/adapter.safetensors", "--input=small", "--out=none", "--box=50,5,9,9"]
    assert main(command) == 2
    assert "lies outside of the frame of 30 x 20 pixels" in capsys.readouterr().err
