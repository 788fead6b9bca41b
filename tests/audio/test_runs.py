"""Whole runs on recordings through the command line, and what a report shows and plays of them."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from sound_files import tone, write, write_esc50, write_folder, write_table

from peft_modal.cli.main import main
from peft_modal.compose import compose
from peft_modal.files import load_adapter
from peft_modal_audio.render import PLAYED_S, render

SIZES = "{width: 24, depth: 2, heads: 2, mlp_width: 48, patch: 8, stride_frequency: 8, stride_time: 8, mels: 32}"
TINY = [
    "--backbone=ast", "--backbone.weights=random", "--backbone.model=custom", f"--backbone.sizes={SIZES}",
    "--head=linear", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--data.seconds=0.5", "--data.mels=32",
    "--data.batch_size=4", "--task.lr=0.02",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def metrics(folder: str) -> dict[str, float]:
    return json.loads((Path(folder) / "metrics.json").read_text())


def test_own_recordings_are_learned_reported_and_predicted() -> None:
    write_folder(Path("sounds"), count=12)
    data = ["--data=folder", "--data.root=sounds", "--data.mask_time=5", "--data.statistics=none"]
    method = ["--method=conformer", "--method.hidden_dim=4", "--method.kernel=3", "--task=classification"]
    assert main(["fit", *TINY, *data, *method, "--trainer.max_epochs=8", "--out", "run"]) == 0
    assert metrics("run")["test/accuracy"] == 1.0
    page = Path("run/report.html").read_text()
    players = re.findall(r'<audio controls [^>]*src="data:audio/wav;base64,([^"]+)"', page)
    assert len(players) == page.count("data:image/png") == 2
    values, rate = soundfile.read(io.BytesIO(base64.b64decode(players[0])))
    assert rate == 16_000
    assert len(values) == 400 + 47 * 160  # of half a second what the frames tell
    assert json.loads(Path("run/report.json").read_text())["problems"] == []

    write(Path("new/long.flac"), tone(210, 1.3, rate=44_100), 44_100)
    write(Path("new/short.ogg"), tone(410, 0.4))
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", "new", "--out", "plain"]) == 0
    rows = json.loads(Path("plain/predictions.json").read_text())
    assert [(Path(row["path"]).name, row["class"]) for row in rows] == [("long.flac", "high"), ("short.ogg", "low")]
    assert (
        main(
            ["predict", "--adapter", "run/adapter.safetensors", "--input", "new", "--out", "windows",
             "--data.window_hop=0.4"]
        ) == 0
    )  # fmt: skip
    with Path("windows/predictions.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [(Path(row["path"]).name, row["start"], row["class"]) for row in table] == [
        ("long.flac", "0.0", "high"), ("long.flac", "0.4", "high"), ("long.flac", "0.8", "high"),
        ("short.ogg", "0.0", "low"),
    ]  # fmt: skip


def test_the_shipped_configuration_takes_a_folder() -> None:
    write_folder(Path("DIR"))
    arguments = ["--config", "audio_adapter.yaml", "--data=folder", "--data.root=DIR", "--data.batch_size=2"]
    assert main(["fit", *arguments, "--trainer.fast_dev_run=true", "--out", "run"]) == 0


def test_a_fold_of_esc50_is_the_seed_s_as_a_comparison_sets_it() -> None:
    write_esc50(Path("esc"))
    arguments = ["--data=esc50", "--data.root=esc", "--method=bitfit", "--task=classification", "--data.seed=3"]
    assert main(["fit", *TINY, *arguments, "--trainer.fast_dev_run=true", "--out", "run"]) == 0
    header = load_adapter(Path("run/adapter.safetensors"))[1]
    data = compose(header.config).nodes["data"].build()
    assert (data.fold, data.seed) == (4, 3)
    assert header.class_names == ("class_0", "class_1", "class_2")
    assert header.preprocessing["statistics"] == "audioset"


def test_recordings_with_several_labels_are_learned_and_predicted() -> None:
    rows = []
    for i in range(24):
        tags = [tag for bit, tag in enumerate(("hum", "beep")) if i >> bit & 1] or ["quiet"]
        wave = sum((tone(hertz) for hertz, tag in ((150, "hum"), (2000, "beep")) if tag in tags), 0.01 * tone(600))
        write(Path(f"sounds/{i}.wav"), wave)
        rows.append((f"sounds/{i}.wav", ";".join(tags), ("train", "val", "test")[max(0, i // 4 - 3)]))
    write_table(Path("list.csv"), ("path", "labels", "split"), rows)
    data = ["--data=tagged", "--data.root=list.csv", "--data.mixup=0.3"]
    assert (
        main(
            ["fit", *TINY, *data, "--task=multi_label", "--method=pfeiffer", "--trainer.max_epochs=12", "--out", "run"]
        ) == 0
    )  # fmt: skip
    found = metrics("run")
    assert found["test/mean_average_precision"] > 0.9
    sections = json.loads(Path("run/report.json").read_text())["sections"]
    table = sections["labels"]["blocks"][0]["rows"]
    assert {name for name, _, _ in table} == {"hum", "beep", "quiet"}
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", "sounds/3.wav", "--out", "p"]) == 0
    (row,) = json.loads(Path("p/predictions.json").read_text())
    assert set(row["probabilities"]) == {"hum", "beep", "quiet"}
    likely = sorted((-p, name) for name, p in row["probabilities"].items() if p >= 0.5)
    assert row["labels"].split(";") == [name for _, name in likely]


def test_one_class_each_needs_the_other_task(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path("sounds"))
    arguments = ["--data=folder", "--data.root=sounds", "--method=lora", "--task=multi_label", "--out", "run"]
    assert main(["fit", *TINY, *arguments]) == 2
    assert "take task 'classification'" in capsys.readouterr().err


def test_other_mel_bins_end_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path("sounds"))
    arguments = ["--data=folder", "--data.root=sounds", "--method=lora", "--task=classification", "--data.mels=40"]
    assert main(["fit", *TINY, *arguments, "--out", "run"]) == 2
    assert "spectrograms have 40 mel bins, the network is for 32; set data.mels to 32" in capsys.readouterr().err


def drawn(sample: dict[str, Any]) -> tuple[Any, bytes | None]:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    heard = render(axes, sample, None)
    return axes.images[0].get_array(), heard


def test_low_sounds_are_drawn_below_and_padding_is_not(tmp_path: Path) -> None:
    spectrogram = torch.zeros(20, 6)
    spectrogram[:12, 1] = torch.linspace(0.5, 1.0, 12)
    picture, heard = drawn({"spectrogram": spectrogram, "length": torch.tensor(12)})
    assert picture.shape == (6, 12)
    assert bool((picture[1] > 0).all())
    assert heard is None
    path = write(tmp_path / "long.wav", tone(440, 9.0))
    sample = {"spectrogram": torch.randn(900, 6), "length": torch.tensor(900), "path": str(path)}
    _, heard = drawn({**sample, "start": torch.tensor(1.0)})
    assert heard is not None
    assert len(soundfile.read(io.BytesIO(heard))[0]) == round(PLAYED_S * 16_000)
    path.unlink()
    _, heard = drawn({**sample, "start": torch.tensor(1.0)})
    assert heard is None


def test_silence_can_be_drawn_and_heard() -> None:
    sample = {"spectrogram": torch.full((20, 6), -1.0), "length": torch.tensor(20)}
    _, heard = drawn({**sample, "waveform": torch.zeros(3000, dtype=torch.int16)})
    assert heard is not None
