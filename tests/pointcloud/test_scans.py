"""Point files of any length: rows are picked while reading, and the rest never lies in memory."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from cloud_benchmarks import write_las

from peft_modal.errors import DataError, MissingExtraError
from peft_modal_pointcloud.data import Folder
from peft_modal_pointcloud.readers import read_cloud, read_scan

MANY = 2_000_000
MOST_MB = 32.0
"""Two million points take 24 MB as float32 and 48 MB as float64; the chunks of a scan some MB."""


def write_ply(path: Path, points: np.ndarray, *, form: str = "binary_little_endian", colours: bool = True) -> None:
    """A cloud with a colour before its coordinates."""
    order = ">" if "big" in form else "<"
    kinds = [("red", "u1")] * colours + [(axis, f"{order}f4") for axis in "xyz"] + [("intensity", f"{order}f8")]
    names = {"u1": "uchar", "f4": "float", "f8": "double"}
    header = ["ply", f"format {form} 1.0", "comment made here", f"element vertex {len(points)}"]
    header += [f"property {names[kind[-2:]]} {name}" for name, kind in kinds]
    rows = np.zeros(len(points), kinds)
    for axis, column in zip("xyz", points.T, strict=True):
        rows[axis] = column
    with path.open("wb") as stream:
        stream.write(("\n".join([*header, "end_header"]) + "\n").encode())
        if form == "ascii":
            stream.writelines(f"{' '.join(str(value) for value in row)}\n".encode() for row in rows.tolist())
        else:
            stream.write(rows.tobytes())


def write_text(path: Path, points: np.ndarray) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write("# x y z\n")
        stream.writelines(f"{x:.3f} {y:.3f} {z:.3f}\n" for x, y, z in points.tolist())


WRITERS = {
    ".npy": np.save, ".ply": write_ply, ".las": write_las, ".laz": write_las, ".txt": write_text,
}  # fmt: skip


def numbered(count: int) -> np.ndarray:
    """Points whose x tells their number."""
    x = np.arange(count, dtype=np.float64)
    return np.stack([x, x % 7, x % 5], axis=1)


@pytest.mark.parametrize("ending", WRITERS)
def test_rows_are_drawn_evenly_in_order_and_whole(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    WRITERS[ending](path, numbered(30_000))
    scan = read_scan(path, num_points=500)
    x, y, z = scan.points.double().numpy().round().T
    assert scan.stored == 30_000
    assert (np.diff(x) > 0).all()
    assert np.array_equal(y, x % 7)
    assert np.array_equal(z, x % 5)
    assert np.histogram(x, 5, (0, 30_000))[0].min() > 60
    assert torch.equal(scan.points, read_scan(path, num_points=500).points)
    assert not torch.equal(scan.points, read_scan(path, num_points=500, seed=1).points)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [ending for ending in WRITERS if ending != ".txt"])
def test_two_million_points_are_read_in_little_memory(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    WRITERS[ending](path, np.random.default_rng(0).normal(size=(MANY, 3)).astype(np.float32))
    read_cloud(path, num_points=10)  # imports
    tracemalloc.start()
    try:
        points = read_cloud(path, num_points=4096)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert points.shape == (4096, 3)
    assert peak < MOST_MB


def test_text_is_read_in_little_memory(tmp_path):
    write_text(tmp_path / "scan.txt", numbered(200_000))
    tracemalloc.start()
    try:
        read_cloud(tmp_path / "scan.txt", num_points=1000)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < 4  # its lines alone take 14


def test_a_folder_of_scans_says_once_that_they_are_sampled(tmp_path, caplog):
    for name in ("tree", "pole"):
        (tmp_path / name).mkdir()
        for i in range(4):
            np.save(tmp_path / name / f"{i}.npy", numbered(50_000 + i))
    data = Folder(root=tmp_path, num_points=64, batch_size=2)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert [record.message for record in caplog.records] == [
        record.message for record in caplog.records if "256 of the 5000" in record.message
    ]
    assert len(caplog.records) == 1
    assert max(len(cloud) for cloud in data._sets["train"].clouds) == 256


def test_map_coordinates_keep_their_millimetres(tmp_path):
    points = numbered(50) * 0.001 + [431_000.0, 5_412_000.0, 300.0]
    for ending in (".las", ".laz"):
        write_las(tmp_path / f"a{ending}", points)
        expected = torch.from_numpy((points - points.min(0)).astype(np.float32))
        torch.testing.assert_close(read_cloud(tmp_path / f"a{ending}"), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_a_ply_cloud_gives_what_trimesh_gives(tmp_path, form):
    points = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    write_ply(tmp_path / "a.ply", points, form=form)
    loaded = trimesh.load(tmp_path / "a.ply", process=False)
    assert torch.equal(read_cloud(tmp_path / "a.ply"), torch.from_numpy(points))
    np.testing.assert_array_equal(np.asarray(loaded.vertices, dtype=np.float32), points)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_a_ply_cloud_that_ends_too_early_is_told(tmp_path, form):
    write_ply(tmp_path / "a.ply", numbered(40), form=form)
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "a.ply").write_bytes(content[: content.rindex(b"end_header") + 200])
    for count in (None, 30):
        with pytest.raises(DataError, match=r"a\.ply' (ends after \d+ of 40 points|cannot be read)"):
            read_cloud(tmp_path / "a.ply", num_points=count)


def test_a_ply_mesh_is_sampled_over_its_surface(tmp_path):
    trimesh.creation.box((2.0, 4.0, 6.0)).export(tmp_path / "a.ply")
    assert read_cloud(tmp_path / "a.ply", num_points=100).shape == (100, 3)


def test_a_las_that_ends_too_early_is_told(tmp_path):
    for ending in (".las", ".laz"):
        path = tmp_path / f"a{ending}"
        write_las(path, np.random.default_rng(0).normal(size=(3000, 3)))
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(DataError, match=rf"a\{ending}'"):
            read_cloud(path)


def test_without_laspy_the_extra_is_named(tmp_path, monkeypatch):
    write_las(tmp_path / "a.las", numbered(5))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "peft-modal\[pointcloud\]"'):
        read_cloud(tmp_path / "a.las")
