"""A tiny ShapeNetPart on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from peft_modal_pointcloud.shapenet_part import COUNTS


def write_shapenet(root: Path, categories: tuple[str, ...] = ("Airplane", "Mug"), count: int = 4) -> None:
    """Random clouds in the layout of the published folder; of four in a row two train, one validates, one tests."""
    rng = np.random.default_rng(0)
    synsets = {name: f"0{i}691156" for i, name in enumerate(categories)}
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text("".join(f"{n}\t{s}\n" for n, s in synsets.items()))
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, synset in synsets.items():
        first = sum(list(COUNTS.values())[: list(COUNTS).index(name)])
        (root / synset).mkdir()
        for i in range(count):
            rows = rng.normal(size=(30 + i, 7))
            rows[:, 6] = first + np.arange(len(rows)) % COUNTS[name]
            np.savetxt(root / synset / f"{name.lower()}{i}.txt", rows, fmt="%.6f")
            split = ("train", "train", "val", "test")[i % 4]
            lists[split].append(f"shape_data/{synset}/{name.lower()}{i}")
    for split, names in lists.items():
        table = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        table.write_text(json.dumps(names[::-1]))
