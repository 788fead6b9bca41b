"""One point cloud out of one file: meshes, point files, scans, arrays and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_modal.errors import DataError, PeftModalError
from peft_modal.extras import require
from peft_modal_pointcloud.scans import ArrayRows, LasRows, Rows, TextRows, ply_rows

SUFFIXES: tuple[str, ...] = (".las", ".laz", ".npy", ".obj", ".off", ".ply", ".stl", ".txt", ".xyz")
"""What `read_cloud` reads; upper and lower case."""

_MESH_POINTS = 8192
_Reader = Callable[[Path, int, np.random.Generator], Rows]


@dataclass(frozen=True, eq=False)
class Scan:
    """What was read of a file."""

    points: Tensor
    """(P, 3) float32."""
    stored: int
    """How many points the file has; of a mesh, how many were sampled."""


def read_cloud(path: str | Path, *, num_points: int | None = None, seed: int = 0) -> Tensor:
    """The points of a file as (P, 3) float32; see `read_scan`."""
    return read_scan(path, num_points=num_points, seed=seed).points


def read_scan(path: str | Path, *, num_points: int | None = None, seed: int = 0) -> Scan:
    """The points of a file, in the file's own coordinates and order.

    A mesh (.obj, .off, .ply, .stl with faces) is sampled uniformly over its surface, the parts of a scene together;
    a file without faces gives its points. Text is separated by commas or white space and may carry comments and
    header lines that start with '#'. Of wider arrays and text the first three columns are taken. Coordinates of .las
    and .laz scans count from the smallest that the file's header tells, since those of a map do not fit float32.

    Of point files longer than `num_points` only the points drawn are kept in memory, and looked at.

    Args:
        path: File with one of SUFFIXES.
        num_points: Points to draw from a mesh (default 8192), and the most to keep of a point file (default all).
        seed: Of the draw; the same file and seed always give the same points.

    Raises:
        DataError: The file is missing, of another kind, corrupt, empty, too narrow, or holds NaN or infinity.
        MissingExtraError: A mesh needs trimesh, a scan laspy, which is not installed.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"'{path}' is not a point cloud file: expected one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"'{path}' does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty.")
    values, stored = _read(reader, path, num_points, np.random.default_rng(seed))
    _check(path, values)
    with np.errstate(over="ignore"):
        points = torch.from_numpy(np.array(values[:, :3], dtype=np.float32))
    bad = int((~points.isfinite()).any(1).sum())
    if bad:
        raise DataError(f"'{path}' has {bad} of {len(points)} points with NaN or infinite coordinates.")
    return Scan(points, stored)


def _read(
    reader: _Reader, path: Path, num_points: int | None, rng: np.random.Generator
) -> tuple[NDArray[np.generic], int]:
    try:
        rows = reader(path, num_points or _MESH_POINTS, rng)
        count = len(rows)
        if num_points is None or count <= num_points:
            return rows.take(None), count
        # `choice` takes memory for what it draws, a permutation for what there is.
        return rows.take(np.sort(rng.choice(count, num_points, replace=False, shuffle=False))), count
    except PeftModalError:
        raise
    except Exception as error:  # trimesh and laspy let every kind of error out of a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{path}' cannot be read as {path.suffix.lower()}: {reason}") from error


def _check(path: Path, values: NDArray[np.generic]) -> None:
    """Refuse what is no table of at least three columns of numbers.

    Raises:
        DataError: It is none.
    """
    if values.dtype.kind not in "fiu":
        raise DataError(f"'{path}' holds values of type {values.dtype}, expected numbers.")
    if values.size == 0:
        raise DataError(f"'{path}' holds no points.")
    if values.ndim != 2 or values.shape[1] < 3:
        raise DataError(f"'{path}' has shape {values.shape}, expected points in rows of at least 3 columns (x, y, z).")


def _read_ply(path: Path, num_points: int, rng: np.random.Generator) -> Rows:
    return ply_rows(path) or _read_mesh(path, num_points, rng)


def _read_mesh(path: Path, num_points: int, rng: np.random.Generator) -> Rows:
    trimesh = require("trimesh", extra="pointcloud")
    # An open file instead of a path: nothing that the file names (materials, textures) is looked up beside it.
    # process=False: else equal vertices are merged.
    with path.open("rb") as stream:
        loaded = trimesh.load(stream, file_type=path.suffix.lower()[1:], process=False)
    parts = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    meshes = [part for part in parts if len(getattr(part, "faces", ()))]
    if not meshes:
        return ArrayRows(np.concatenate([np.empty((0, 3)), *(part.vertices for part in parts)]))
    mesh = meshes[0] if len(meshes) == 1 else trimesh.util.concatenate(meshes)
    if not np.isfinite(mesh.vertices).all():
        raise DataError(f"'{path}' has vertices with NaN or infinite coordinates.")
    if not mesh.area > 0:
        raise DataError(f"'{path}' has {len(mesh.faces)} faces of area 0: there is no surface to sample.")
    return ArrayRows(np.asarray(trimesh.sample.sample_surface(mesh, num_points, seed=rng)[0]))


def _read_array(path: Path, _num_points: int, _rng: np.random.Generator) -> Rows:
    # Memory mapping compares the shape in the header with the file's size before anything is allocated.
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise DataError(f"'{path}' is an archive of arrays, expected one array.")
    _check(path, values)
    return ArrayRows(values)


_READERS: dict[str, _Reader] = {
    ".npy": _read_array,
    ".ply": _read_ply,
    **dict.fromkeys((".las", ".laz"), lambda path, _num_points, _rng: LasRows(path)),
    **dict.fromkeys((".txt", ".xyz"), lambda path, _num_points, _rng: TextRows(path)),
    **dict.fromkeys((".obj", ".off", ".stl"), _read_mesh),
}
