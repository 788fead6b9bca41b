"""How much of a training step on recordings is reading and feature extraction, with and without the cache.

Clips of 5 s at 44.1 kHz with 16 bits, as ESC-50 has them: decoded, resampled to 16 kHz and made into 500 frames of 128
log-mel values, with SpecAugment. A step is forward, loss, backward and AdamW of LoRA with a linear head, in float32, on
a batch in memory. Both take turns in one process with one thread, and are told for one clip: medians over rounds.

    python benchmarks/audio_features.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import torch
from torch.nn import functional

from peft_modal.files import write_text
from peft_modal.methods.lora import LoRA
from peft_modal_audio.backbone import AST
from peft_modal_audio.clips import Cached
from peft_modal_audio.data import Folder
from peft_modal_heads.linear import LinearHead

ROOT: Final = Path(__file__).parent.parent
RATE: Final = 44_100
SECONDS: Final = 5.0
CACHES: Final[tuple[Cached, ...]] = ("none", "waveforms", "spectrograms")
BATCHES: Final = {"nano": 16, "base": 2}
"""Clips of a step of each network."""


def write_recordings(root: Path, count: int) -> None:
    """Folders of two classes of noise, each clip another."""
    for number in range(count):
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, round(SECONDS * RATE))
        path = root / ("even", "odd")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise, RATE)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def reader(root: Path, cache: Cached, batch_size: int) -> Callable[[], Any]:
    """What makes a batch; the cache is filled."""
    data = Folder(
        root=root, seconds=SECONDS, mask_frequency=24, mask_time=80, cache=cache, batch_size=batch_size, val_share=0.0,
        test_share=0.0,
    )  # fmt: skip
    data.setup("fit")
    source = data.train_source(data._sets["train"])  # noqa: SLF001 — what the loader is made of
    source.batch(0, 0)
    return lambda: source.batch(0, 0)


def step(model: str, batch_size: int) -> Callable[[], None]:
    """What trains on a batch."""
    backbone = AST(weights="random", model=model)
    adapter = LoRA(rank=8).attach(backbone)
    head = LinearHead(backbone.feature_spec(), 50)
    trained = [*adapter.named_trained().values(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    spectrogram, labels = torch.randn(batch_size, round(100 * SECONDS), 128), torch.arange(batch_size)

    def run() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(head(backbone({"spectrogram": spectrogram})), labels).backward()
        optimizer.step()

    run()
    return run


def measure(model: str, rounds: int) -> dict[str, float]:
    """Milliseconds of one clip, of a step and of reading with each cache."""
    batch_size = BATCHES[model]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PEFT_MODAL_CACHE"] = str(Path(folder) / "cache")
        root = Path(folder) / "sounds"
        write_recordings(root, max(4, batch_size))
        runs: dict[str, Callable[[], Any]] = {"step": step(model, batch_size)}
        runs |= {cache: reader(root, cache, batch_size) for cache in CACHES}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(timed(run))
    return {name: 1000 * statistics.median(of) / batch_size for name, of in times.items()}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/audio_features.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    found["rows"] = {model: measure(model, options.rounds if model == "nano" else 3) for model in BATCHES}
    write_text(options.out, json.dumps(found, indent=2) + "\n")
    for model, row in found["rows"].items():
        for cache in CACHES:
            share = row[cache] / (row[cache] + row["step"])
            print(f"{model:6} {cache:13} {row[cache]:8.2f} ms of {row[cache] + row['step']:8.1f} ms, {share:.1%}")


if __name__ == "__main__":
    main()
