"""Small sound files, and benchmarks of them in the layouts that their authors ship."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 16_000


def tone(hertz: float, seconds: float = 0.5, *, rate: int = RATE, channels: int = 1) -> NDArray[np.float32]:
    """A sine (S,), or (S, channels) of which the later ones are silent."""
    wave = (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)
    if channels == 1:
        return wave
    return np.concatenate([wave[:, None], np.zeros((len(wave), channels - 1), np.float32)], axis=1)


def write(path: Path, wave: NDArray[Any], rate: int = RATE, subtype: str | None = None) -> Path:
    """Write a sound file; its ending says which kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([columns, *rows])
    return path


def write_folder(root: Path, classes: Sequence[str] = ("high", "low"), count: int = 10) -> Path:
    """`root/<class>/<n>.wav`, a tone of another height for each class."""
    for number, name in enumerate(classes):
        for i in range(count):
            write(root / name / f"{i:02d}.wav", tone(200 * (number + 1) + 5 * i))
    return root


def write_esc50(root: Path, *, classes: int = 3, per_fold: int = 2) -> Path:
    """ESC-50 with fewer classes and clips."""
    rows = []
    for fold in range(1, 6):
        for target in range(classes):
            for take in range(per_fold):
                name = f"{fold}-{1000 * fold + take}-A-{target}.wav"
                write(root / "audio" / name, tone(300 + 100 * target, rate=44_100), 44_100)
                rows.append((name, fold, target, f"class_{target}", False, 1000 * fold + take, "A"))
    columns = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    write_table(root / "meta" / "esc50.csv", columns, rows)
    return root


def write_urbansound(root: Path) -> Path:
    """UrbanSound8K with two slices in each fold, of many rates, depths and numbers of channels."""
    names = ("air_conditioner", "dog_bark")
    subtypes = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "IMA_ADPCM")
    rows = []
    for fold in range(1, 11):
        rate = (8_000, 22_050, 44_100, 48_000, 96_000)[fold % 5]
        for number, (label, name) in enumerate(zip((0, 3), names, strict=True)):
            file = f"{fold}00{number}-{label}-0-0.wav"
            wave = tone(400, rate=rate, channels=1 + (fold + number) % 2)
            write(root / "audio" / f"fold{fold}" / file, wave, rate, subtypes[(fold + number) % 6])
            rows.append((file, fold * 100 + number, 0.0, 0.5, 1, fold, label, name))
    columns = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
    write_table(root / "metadata" / "UrbanSound8K.csv", columns, rows)
    return root


def write_speech_commands(root: Path, words: Sequence[str] = ("yes", "no", "up")) -> Path:
    """Speech Commands with fewer words; of each a file is validated on and one is tested on."""
    lists: dict[str, list[str]] = {"validation_list.txt": [], "testing_list.txt": []}
    for number, word in enumerate(words):
        for i in range(5):
            name = f"{word}/speaker{i}_nohash_0.wav"
            write(root / name, tone(300 + 100 * number, 0.4 + 0.1 * i))
            for place, table in enumerate(lists):
                if i == place:
                    lists[table].append(name)
    for table, names in lists.items():
        (root / table).write_text("\n".join(names) + "\n")
    write(root / "_background_noise_" / "hum.wav", tone(50, 2.0))
    return root


def write_fluent(root: Path) -> Path:
    """Fluent Speech Commands with three intents."""
    intents = (
        ("change language", "none", "none"), ("activate", "lights", "kitchen"), ("activate", "lights", "bedroom")
    )  # fmt: skip
    columns = ("", "path", "speakerId", "transcription", "action", "object", "location")
    for part, count in (("train", 3), ("valid", 1), ("test", 2)):
        rows = []
        for number, intent in enumerate(intents):
            for i in range(count):
                name = f"wavs/speakers/{part}{i}/{number}.wav"
                write(root / name, tone(300 + 100 * number))
                rows.append((len(rows), name, f"{part}{i}", 'Turn on, "please"', *intent))
        write_table(root / "data" / f"{part}_data.csv", columns, rows)
    return root
