r"""A tuned tracker on the generated test videos beside what it has to beat, and its speed over the plain network's.

Beside it: the same network before training, one trained from random weights (another adapter file), normalised
cross-correlation with the first frame's target, and a box that stays where it is. Speed: frames per second of the whole
inference loop with the adapter folded in, over the forward pass of backbone and head on the same search pictures,
videos side by side; both are timed in turns, the ratio is the median over rounds.

    python -m peft_modal fit --config tracking_lorat.yaml --out runs/lorat
    python -m peft_modal fit --config tracking_lorat.yaml --backbone.weights=random --out runs/lorat-random
    python benchmarks/tracking.py --adapter runs/lorat/adapter.safetensors \
        --random runs/lorat-random/adapter.safetensors
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from peft_modal.api import Model, build, load
from peft_modal.files import write_text
from peft_modal_tracking.metrics import Result, got10k, mean_scores, one_pass
from peft_modal_tracking.sequences import Video
from peft_modal_tracking.tracker import Tracker

ROOT = Path(__file__).parent.parent
REACH = 1.0
"""How far from the last box correlation looks, in its sides."""


def correlated(video: Video) -> Tensor:
    """Boxes x, y, w, h (T, 4) where the target of the first frame correlates best, at its first size."""
    x, y, width, height = (int(v) for v in video.boxes[0].round().tolist())
    template = video.frames[0][:, y : y + height, x : x + width].float()
    template = (template - template.mean()) / template.std().clamp(min=1e-3)
    boxes = [video.boxes[0]]
    for frame in list(video.frames)[1:]:
        left, right = _span(x, width, frame.shape[-1])
        top, bottom = _span(y, height, frame.shape[-2])
        window = frame[None, :, top:bottom, left:right].float()
        ones = torch.ones_like(template)[None]
        mean = functional.conv2d(window, ones) / template.numel()
        square = functional.conv2d(window.square(), ones) / template.numel()
        score = functional.conv2d(window, template[None]) / (square - mean.square()).clamp(min=1e-3).sqrt()
        row, column = divmod(int(score.flatten().argmax()), score.shape[-1])
        x, y = left + column, top + row
        boxes.append(torch.tensor([x, y, width, height], dtype=torch.float32))
    return torch.stack(boxes)


def _span(start: int, length: int, limit: int) -> tuple[int, int]:
    """Where to look along one axis; as long as the target at least."""
    low = min(max(0, start - round(REACH * length)), limit - length)
    return low, min(limit, max(start + length + round(REACH * length), low + length))


def figures(videos: Sequence[Video], found: Sequence[Tensor]) -> dict[str, float]:
    """One-pass evaluation and GOT-10k's."""
    results = [
        Result(boxes, video.boxes, video.visible, video.frames.size(0))
        for video, boxes in zip(videos, found, strict=True)
    ]
    scores = mean_scores([one_pass(result, video.rules) for result, video in zip(results, videos, strict=True)])
    return {**scores.figures, **got10k(results)[0]}


def untrained(model: Model) -> Tracker:
    """The network of an adapter file as its training began."""
    fresh = build(model.composed, model.class_names)
    fresh.header = model.header
    return Tracker.of(fresh)


def speed(tracker: Tracker, videos: Sequence[Video], rounds: int) -> dict[str, float]:
    """Frames per second of the loop and of the plain forward pass, and the median of their ratios."""
    frames = sum(len(video) - 1 for video in videos)
    backbone = tracker.backbone
    batch = backbone.example_batch(len(videos))
    steps = max(len(video) for video in videos) - 1
    loop, plain = [], []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        tracker.track_all(videos, at_once=len(videos))
        loop.append(time.perf_counter() - started)
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(steps):
                tracker.head(backbone(batch))
        plain.append(time.perf_counter() - started)
    ratios = [p / q for p, q in zip(plain[1:], loop[1:], strict=True)]
    return {
        "frames_per_second": frames / statistics.median(loop[1:]),
        "plain_frames_per_second": frames / statistics.median(plain[1:]),
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--random", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/tracking.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.adapter)
    data = model.composed.nodes["data"].build()
    videos: list[Video] = data.load("test")
    trackers = {"tuned": Tracker.load(arguments.adapter), "before training": untrained(model)}
    if arguments.random is not None:
        trackers["trained from random weights"] = Tracker.load(arguments.random)
    rows = {
        name: figures(videos, [track.boxes for track in tracker.track_all(videos)])
        for name, tracker in trackers.items()
    }
    rows["normalised cross-correlation"] = figures(videos, [correlated(video) for video in videos])
    rows["stays put"] = figures(videos, [video.boxes[:1].expand(len(video), 4) for video in videos])
    found = {
        "rows": rows, "speed": speed(trackers["tuned"], videos, arguments.rounds), "videos": len(videos),
        "threads": arguments.threads, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    write_text(arguments.out, json.dumps(found, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:32}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(found["speed"])


if __name__ == "__main__":
    main()
