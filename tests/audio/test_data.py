"""Data modules of recordings: layouts as published, one's own files, augmentation, the cache, and bad files."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sound_files import (
    tone,
    write,
    write_esc50,
    write_fluent,
    write_folder,
    write_speech_commands,
    write_table,
    write_urbansound,
)

from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL
from peft_modal.errors import ConfigError, DataError
from peft_modal_audio.data import Folder, Tagged
from peft_modal_audio.features import SAMPLE_RATE
from peft_modal_audio.folds import ESC50, UrbanSound8K
from peft_modal_audio.mixing import mixed_pair
from peft_modal_audio.recording_data import RecordingData
from peft_modal_audio.recordings import read_clip
from peft_modal_audio.speech import FluentSpeechCommands, SpeechCommands

COLUMNS = ("path", "labels", "split")
SMALL: dict[str, Any] = {"seconds": 0.5, "mels": 32, "batch_size": 4}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def ready(data: RecordingData) -> RecordingData:
    data.setup(None)
    return data


def files(data: RecordingData, part: str) -> list[Path]:
    return [item.path for item in data._sets[part].items]  # type: ignore[index]


def test_a_batch_is_what_its_files_are(tmp_path: Path) -> None:
    data = ready(Folder(root=write_folder(tmp_path / "sounds"), **SMALL))
    batch = next(iter(data.test_dataloader()))
    assert batch["spectrogram"].shape == (4, 50, 32)
    assert batch["spectrogram"].dtype == torch.float32
    assert data.class_names == ("high", "low")
    for i, path in enumerate(batch["path"]):
        assert data.class_names[batch["label"][i]] == Path(path).parent.name
        expected = data.front.spectrogram(read_clip(path, samples=data.front.samples))
        assert torch.equal(batch["spectrogram"][i], expected)
    assert batch["length"].tolist() == [48] * 4
    assert data.class_counts() == [7, 7]
    assert set(data.preprocessing) == {"frames", "mels", "statistics", "channel", "resampling"}


def test_training_batches_follow_from_the_seed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "sounds")
    options = {**SMALL, "mask_frequency": 8, "mask_time": 10, "crop": "random", "seconds": 0.2, "mixup": 0.5}
    one, again = (ready(Folder(root=root, **options)).train_source for _ in range(2))
    data = ready(Folder(root=root, **options))
    other = ready(Folder(root=root, seed=1, val_share=0.1, **options))
    first = one(data._sets["train"]).batch(0, 1)
    second = again(data._sets["train"]).batch(0, 1)
    assert torch.equal(first["spectrogram"], second["spectrogram"])
    assert first["path"] == second["path"]
    assert not torch.equal(other.train_source(data._sets["train"]).batch(0, 1)["spectrogram"], first["spectrogram"])
    assert not torch.equal(one(data._sets["train"]).batch(1, 1)["spectrogram"], first["spectrogram"])


def test_random_crops_come_from_anywhere_and_say_where(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(5):
            write(tmp_path / "s" / name / f"{i}.wav", tone(100 + 50 * i, 3.0), subtype="FLOAT")
    data = ready(Folder(root=tmp_path / "s", crop="random", **SMALL))
    batch = data.train_source(data._sets["train"]).batch(0, 0)
    starts = batch["start"].tolist()
    assert len(set(starts)) == 4
    assert 0 <= min(starts) < max(starts) <= 2.5
    for i, path in enumerate(batch["path"]):
        clip = read_clip(path, samples=data.front.samples, start_s=starts[i])
        assert torch.equal(batch["spectrogram"][i], data.front.spectrogram(clip))


def test_mixed_clips_have_both_labels(tmp_path: Path) -> None:
    data = ready(Folder(root=write_folder(tmp_path / "sounds"), mixup=1.0, **SMALL))
    batch = data.train_source(data._sets["train"]).batch(0, 0)
    assert set(batch[PARTNER_LABEL].tolist()) <= {0, 1}
    assert bool(((batch[OWN_SHARE] > 0.1) & (batch[OWN_SHARE] < 0.9)).all())
    plain = ready(Folder(root=tmp_path / "sounds", mixup=1e-9, **SMALL))
    unmixed = plain.train_source(plain._sets["train"]).batch(0, 0)
    assert unmixed[OWN_SHARE].tolist() == [1.0] * 4
    assert torch.equal(unmixed[PARTNER_LABEL], unmixed["label"])


@pytest.mark.parametrize("length", [50, 100, 200])
def test_mixtures_have_no_mean_and_the_first_one_s_length(length: int) -> None:
    one, other = torch.randn(100) + 3, torch.randn(length) - 2
    mixed, own = mixed_pair(one, other, torch.Generator().manual_seed(0))
    assert mixed.shape == (100,)
    assert abs(float(mixed.mean())) < 1e-6
    centred = (other - other.mean())[:100]
    padded = torch.cat([centred, torch.zeros(100 - len(centred))])
    expected = own * (one - one.mean()) + (1 - own) * padded
    assert torch.allclose(mixed, expected - expected.mean(), atol=1e-6)


@pytest.mark.parametrize("cache", ["waveforms", "spectrograms"])
def test_the_cache_changes_nothing_and_is_used(tmp_path: Path, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "sounds")
    options = {**SMALL, "mask_frequency": 8, "mask_time": 10}
    plain, first, second = (
        ready(Folder(root=root, cache=kind, **options)) for kind in ("none", cache, cache)
    )  # fmt: skip
    batches = [data.train_source(data._sets["train"]).batch(0, 0) for data in (plain, first)]

    def unread(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("peft_modal_audio.clips.read_clip", unread)
    batches.append(second.train_source(second._sets["train"]).batch(0, 0))
    for batch in batches[1:]:
        assert torch.equal(batch["spectrogram"], batches[0]["spectrogram"])
        assert torch.equal(batch["length"], batches[0]["length"])
    changed = next(iter(batches[0]["path"]))
    write(Path(changed), tone(1000, 0.4))
    with pytest.raises(AssertionError, match="read again"):
        second.reader.log_mels(Path(changed))


def test_spectrograms_leave_nothing_to_crop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to crop or mix"):
        Folder(root=tmp_path, cache="spectrograms", crop="random")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fold", [1, 3, None])
def test_esc50_keeps_its_folds(tmp_path: Path, fold: int | None, nested: bool) -> None:
    write_esc50(tmp_path / "ESC-50-master" if nested else tmp_path)
    data = ready(ESC50(root=tmp_path, fold=fold, seed=6, **{**SMALL, "seconds": 0.5}))
    tested = 2 if fold is None else fold
    validated = {1: 5, 2: 1, 3: 2}[tested]
    of = {part: {path.name[0] for path in files(data, part)} for part in ("train", "val", "test")}
    assert of["test"] == {str(tested)}
    assert of["val"] == {str(validated)}
    assert of["train"] == set("12345") - of["test"] - of["val"]
    assert data.class_names == ("class_0", "class_1", "class_2")
    assert [item.label for item in data._sets["test"].items] == [
        int(path.stem.rpartition("-")[2]) for path in files(data, "test")
    ]
    four = ready(ESC50(root=tmp_path, fold=fold, seed=6, validate=False, **SMALL))
    assert {path.name[0] for path in files(four, "train")} == set("12345") - of["test"]
    assert four.val_dataloader() == []
    assert "set it to true" in four.no_samples("val")


def test_no_source_of_esc50_is_in_two_splits(tmp_path: Path) -> None:
    write_esc50(tmp_path)
    with (tmp_path / "meta" / "esc50.csv").open() as stream:
        sources = {row["filename"]: row["src_file"] for row in csv.DictReader(stream)}
    for fold in range(1, 6):
        data = ready(ESC50(root=tmp_path, fold=fold, **SMALL))
        splits = [{sources[path.name] for path in files(data, part)} for part in ("train", "val", "test")]
        assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]


def test_shots_are_drawn_by_the_seed_or_are_the_first(tmp_path: Path) -> None:
    write_esc50(tmp_path, per_fold=4)
    few = ready(ESC50(root=tmp_path, fold=1, shots=3, draw="first", **SMALL))
    names = [path.name for path in files(few, "train")]
    assert len(names) == 9
    assert all(name.startswith("2-") for name in names)
    drawn = [
        [path.name for path in files(ready(ESC50(root=tmp_path, fold=1, shots=k, seed=s, **SMALL)), "train")]
        for k, s in ((3, 0), (3, 1), (2, 0))
    ]
    assert drawn[0] != drawn[1]
    assert set(drawn[2]) < set(drawn[0])
    with pytest.raises(DataError, match=r"has 12 samples to train on, data\.shots asks for 13"):
        ready(ESC50(root=tmp_path, fold=1, shots=13, **SMALL))


def test_urbansound_reads_every_kind_of_file(tmp_path: Path) -> None:
    data = ready(UrbanSound8K(root=write_urbansound(tmp_path), fold=10, **SMALL))
    assert {path.parent.name for path in files(data, "test")} == {"fold10"}
    assert {path.parent.name for path in files(data, "val")} == {"fold9"}
    assert len(files(data, "train")) == 16
    assert len(data.class_names) == 10
    batches = [data.train_source(data._sets["train"]).batch(0, i) for i in range(4)]
    assert all(bool(batch["spectrogram"].isfinite().all()) for batch in batches)
    assert {int(label) for batch in batches for label in batch["label"]} == {0, 3}
    # fsIDs, in front of the first dash, lie in one split each.
    ids = [{path.name.partition("-")[0] for path in files(data, part)} for part in ("train", "val", "test")]
    assert not ids[0] & ids[1] | ids[0] & ids[2] | ids[1] & ids[2]


def test_speech_commands_are_split_by_their_lists(tmp_path: Path) -> None:
    data = ready(SpeechCommands(root=write_speech_commands(tmp_path), **{**SMALL, "seconds": 1.0}))
    assert data.class_names == ("no", "up", "yes")
    assert {path.name[:8] for path in files(data, "val")} == {"speaker0"}
    assert {path.name[:8] for path in files(data, "test")} == {"speaker1"}
    assert {path.name[:8] for path in files(data, "train")} == {"speaker2", "speaker3", "speaker4"}
    assert "hum.wav" not in {path.name for path in files(data, "train")}
    lengths = {int(one["length"]) for one in (data._sets["train"][i] for i in range(9))}
    assert lengths == {58, 68, 78}
    (tmp_path / "testing_list.txt").write_text("maybe/x.wav\n")
    with pytest.raises(DataError, match=r"testing_list\.txt', line 1: there is no folder 'maybe'"):
        ready(SpeechCommands(root=tmp_path, **{**SMALL, "seconds": 1.0}))


def test_fluent_speech_commands_are_intents(tmp_path: Path) -> None:
    data = ready(FluentSpeechCommands(root=write_fluent(tmp_path), **SMALL))
    assert data.class_names == (
        "activate, lights, bedroom", "activate, lights, kitchen", "change language, none, none"
    )  # fmt: skip
    assert [len(files(data, part)) for part in ("train", "val", "test")] == [9, 3, 6]
    assert [item.label for item in data._sets["val"].items] == [2, 1, 0]


def test_a_csv_with_folds_serves_for_cross_validation(tmp_path: Path) -> None:
    write_folder(tmp_path, count=6)
    rows = [(f"{name}/{i:02d}.wav", name, i % 3) for name in ("high", "low") for i in range(6)]
    table = write_table(tmp_path / "list.csv", ("path", "label", "fold"), rows)
    data = ready(Folder(root=table, fold=0, **SMALL))
    assert {int(path.stem) % 3 for path in files(data, "test")} == {0}
    assert {int(path.stem) % 3 for path in files(data, "val")} == {2}
    assert {int(path.stem) % 3 for path in files(data, "train")} == {1}
    with pytest.raises(ConfigError, match=r"has the folds \[0, 1, 2\]; 7 must be"):
        ready(Folder(root=table, fold=7, **SMALL))


def test_recordings_may_have_several_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, ("x",), count=4)
    rows = [
        ("x/00.wav", "dog; bird", "train"), ("x/01.wav", "cat", "train"), ("x/02.wav", "dog", "val"),
        ("x/03.wav", "cat;bird", "test"),
    ]  # fmt: skip
    table = write_table(tmp_path / "list.csv", COLUMNS, rows)
    data = ready(Tagged(root=table, **{**SMALL, "mixup": 1.0}))
    assert data.class_names == ("bird", "cat", "dog")
    assert data.class_counts() == [1, 1, 1]
    assert next(iter(data.test_dataloader()))["label"].tolist() == [[1.0, 1.0, 0.0]]
    batch = data.train_source(data._sets["train"]).batch(0, 0)
    assert batch["label"].shape == batch[PARTNER_LABEL].shape == (2, 3)
    with pytest.raises(DataError, match="no training recording has the label 'bark'"):
        ready(
            Tagged(
                root=write_table(tmp_path / "l.csv", ("path", "labels", "split"), [*rows, ("x/03.wav", "bark", "val")])
            )
        )


def spoil(root: Path) -> list[str]:
    """Bad files among good ones."""
    (root / "high" / "text.wav").write_text("no sound")
    write(root / "low" / "empty.wav", np.zeros(0, np.float32))
    return ["text.wav", "empty.wav"]


def test_bad_files_end_a_run_or_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "sounds")
    bad = spoil(root)
    data = ready(Folder(root=root, val_share=0.0, test_share=0.0, **SMALL))
    source = data.train_source(data._sets["train"])
    with pytest.raises(DataError, match=r"(text|empty)\.wav'"):
        _ = [source.batch(0, i) for i in range(len(source))]
    with caplog.at_level(logging.WARNING):
        data = ready(Folder(root=root, val_share=0.0, test_share=0.0, unreadable="skip", **SMALL))
    assert "2 of 22 files are left out" in caplog.text
    assert all(name in caplog.text for name in bad)
    assert len(files(data, "train")) == 20
    for path in root.rglob("*.wav"):
        path.write_text("no sound")
    with pytest.raises(DataError, match="none of 22 files can be read; the first"):
        ready(Folder(root=root, unreadable="skip", **SMALL))


def test_a_file_that_breaks_off_behind_its_start_costs_its_clip_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 8 * SAMPLE_RATE)
    for i in range(4):
        path = write(tmp_path / "s" / "ab"[i % 2] / f"{i}.flac", wave)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    options = {**SMALL, "crop": "random", "val_share": 0.0, "test_share": 0.0}
    data = ready(Folder(root=tmp_path / "s", unreadable="skip", **options))
    assert len(files(data, "train")) == 4
    with caplog.at_level(logging.WARNING):
        sizes = [len(data.train_source(data._sets["train"]).batch(epoch, 0)["label"]) for epoch in range(8)]
    assert {3, 4} >= set(sizes)
    assert 3 in sizes
    assert "is left out of a batch" in caplog.text


def test_predictions_are_of_files_or_of_windows_with_times(tmp_path: Path) -> None:
    write(tmp_path / "long.wav", tone(300, 2.3))
    write(tmp_path / "short.flac", tone(300, 0.3))
    plain = Folder(root=tmp_path, **SMALL)
    names, batches = plain.predict_items(tmp_path)
    assert [Path(str(name)).name for name in names] == ["long.wav", "short.flac"]
    assert [batch["spectrogram"].shape for batch in batches] == [(2, 50, 32)]
    data = Folder(root=tmp_path, window_hop=0.25, **SMALL)
    names, batches = data.predict_items(tmp_path)
    rows: list[Any] = list(names)
    assert [row["start"] for row in rows if row["path"].endswith("long.wav")] == [0.25 * i for i in range(9)]
    assert [row["start"] for row in rows if row["path"].endswith("short.flac")] == [0.0]
    assert rows[3]["end"] == pytest.approx(0.75 + data.front.samples / SAMPLE_RATE, abs=1e-3)
    made = list(batches)
    assert sum(len(batch["spectrogram"]) for batch in made) == len(rows)
    expected = read_clip(tmp_path / "long.wav", samples=data.front.samples, start_s=0.75)
    assert torch.equal(made[0]["spectrogram"][3], data.front.spectrogram(expected))
    assert "label" not in made[0]


def test_predictions_leave_out_what_cannot_be_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "sounds")
    spoil(root)
    data = Folder(root=root, unreadable="skip", **SMALL)
    names, batches = data.predict_items(root)
    assert len(names) == 20
    assert sum(len(batch["spectrogram"]) for batch in batches) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("filename,fold\n", r"has no column target, category; it has filename, fold"),
        ("filename,fold,target,category\nx.wav,one,0,dog\n", r"line 2: the recording '.*x\.wav' does not exist"),
        ("filename,fold,target,category\n1-1-A-0.wav,one,0,dog\n", r"line 2: fold is 'one', expected a whole number"),
        ("filename,fold,target,category\n1-1-A-0.wav,1,0,\n", r"line 2: category is empty"),
        ("filename,fold,target,category\n1-1-A-0.wav,1,4,dog\n", r"classes are \[4\], expected 0 to 0"),
        ("filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n", r"no recordings of fold 2, 3, 4, 5"),
    ],
)
def test_a_table_that_is_none_says_where(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "audio" / "1-1-A-0.wav", tone(300))
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        ready(ESC50(root=tmp_path, **SMALL))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"UrbanSound8K\.csv' does not exist"):
        ready(UrbanSound8K(root=tmp_path))
