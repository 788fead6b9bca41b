"""Time of cutting clouds into patches: farthest point sampling and neighbours, 1024 points to 64 x 32, batch 32.

Ours beside the same searches in a few plain lines of PyTorch, and beside PyTorch3D's where it is installed. Rounds go
through all of them in turn, so that a busy machine slows them alike; medians and ranges over rounds are written.

    python benchmarks/grouping.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from peft_modal.files import write_text
from peft_modal_pointcloud import sampling, sampling_pytorch3d

RESULT = Path(__file__).parent / "results" / "grouping.json"
BATCH, POINTS, GROUPS, SIZE = 32, 1024, 64, 32
Search = tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, Tensor, int], Tensor]]


def plain_farthest(points: Tensor, num: int) -> Tensor:
    """As it is usually written, without a rule about the origin."""
    picked = torch.zeros(len(points), num, dtype=torch.long)
    running = torch.full(points.shape[:2], 1e10)
    for step in range(1, num):
        last = points.gather(1, picked[:, step - 1, None, None].expand(-1, -1, 3))
        running = torch.minimum(running, (points - last).square().sum(-1))
        picked[:, step] = running.argmax(1)
    return picked


def plain_nearest(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """All distances, then the smallest."""
    distances = torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k, largest=False).indices


def searches() -> dict[str, Search]:
    """Whose operators are measured."""
    found: dict[str, Search] = {
        "ours": (sampling.farthest_point_sample, sampling.knn),
        "plain PyTorch": (plain_farthest, plain_nearest),
    }
    if importlib.util.find_spec("pytorch3d") is not None:
        found["PyTorch3D"] = (sampling_pytorch3d.farthest_point_sample, sampling_pytorch3d.knn)
    return found


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    points = torch.randn(BATCH, POINTS, 3, generator=torch.Generator().manual_seed(0))
    centres = sampling.gather_points(points, sampling.farthest_point_sample(points, GROUPS))
    times: dict[str, dict[str, list[float]]] = {}
    for turn in range(arguments.rounds + 2):
        for name, (farthest, nearest) in searches().items():
            row = {
                "farthest_ms": timed(lambda farthest=farthest: farthest(points, GROUPS)),
                "nearest_ms": timed(lambda nearest=nearest: nearest(points, centres, SIZE)),
            }
            row["both_ms"] = sum(row.values())
            if turn >= 2:  # warm
                for figure, value in row.items():
                    times.setdefault(name, {}).setdefault(figure, []).append(value)
    result = {
        "shape": {"batch": BATCH, "points": POINTS, "groups": GROUPS, "size": SIZE},
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "pytorch3d": "PyTorch3D" in times,
        "median_ms": {name: {k: round(statistics.median(v), 2) for k, v in row.items()} for name, row in times.items()},
        "range_ms": {
            name: {k: [round(min(v), 2), round(max(v), 2)] for k, v in row.items()} for name, row in times.items()
        },
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["median_ms"], indent=2))


if __name__ == "__main__":
    main()
