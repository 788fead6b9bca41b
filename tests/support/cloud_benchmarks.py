"""Writes point-cloud benchmarks in their published layouts, with a handful of small clouds, and scans."""

from __future__ import annotations

import pickle  # noqa: TID251 — the published form
from collections.abc import Sequence
from pathlib import Path

import h5py
import laspy
import numpy as np
from numpy.typing import NDArray

from peft_modal_pointcloud.modelnet import CLASSES, FOLDER

SCAN_FILES = {
    "obj_bg": ("main_split", "objectdataset.h5"),
    "obj_only": ("main_split_nobg", "objectdataset.h5"),
    "pb_t50_rs": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}


def clouds(count: int, points: int, *, seed: int, columns: int = 3) -> NDArray[np.float32]:
    """Random clouds away from the origin."""
    return (np.random.default_rng(seed).normal(size=(count, points, columns)) * 0.3 + 2).astype(np.float32)


def write_scanobjectnn(root: Path, *, points: int = 2048, train: int = 30, test: int = 15) -> None:
    """All three variants, every class alike."""
    for seed, (folder, suffix) in enumerate(SCAN_FILES.values()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, count in (("training", train), ("test", test)):
            with h5py.File(root / folder / f"{name}_{suffix}", "w") as file:
                file["data"] = clouds(count, points, seed=10 * seed + count)
                file["label"] = np.arange(count) % 15
                file["mask"] = np.zeros((count, points), np.int8)


def write_modelnet_text(root: Path, shapes: dict[str, Sequence[str]], *, points: int = 1200) -> None:
    """The lists and a text file for each shape, of which `shapes` has the names by split."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    for part, names in shapes.items():
        (folder / f"modelnet40_{part}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        for seed, name in enumerate(names):
            path = folder / name.rpartition("_")[0] / f"{name}.txt"
            path.parent.mkdir(exist_ok=True)
            np.savetxt(path, clouds(1, points, seed=seed, columns=6)[0], fmt="%.6f", delimiter=",")


def write_modelnet_pickles(root: Path, labels: dict[str, Sequence[int]], *, points: int = 8192) -> None:
    """The two `.dat` files, as NumPy 1 on Python 3 wrote them."""
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for part, of_part in labels.items():
        content = [
            list(clouds(len(of_part), points, seed=len(part), columns=6)), [np.array([x], np.int32) for x in of_part]
        ]  # fmt: skip
        with (root / FOLDER / f"modelnet40_{part}_8192pts_fps.dat").open("wb") as stream:
            pickle.dump(content, stream, protocol=3)


def write_modelnet_fewshot(folder: Path, *, way: int = 5, shot: int = 10, fold: int = 0, points: int = 8192) -> None:
    """A fold's file."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for part, count in (("train", shot), ("test", 20)):
        data = clouds(way * count, points, seed=fold + count, columns=6)
        content[part] = [(cloud, i % way, 7 + i % way) for i, cloud in enumerate(data)]
    with (folder / f"{fold}.pkl").open("wb") as stream:
        pickle.dump(content, stream)


def write_las(path: Path, points: NDArray[np.floating]) -> None:
    """A scan, compressed if it is called .laz."""
    las = laspy.create(point_format=3, file_version="1.2")
    las.header.offsets, las.header.scales = points.min(0), [0.001] * 3
    las.x, las.y, las.z = points.T
    las.write(path)
