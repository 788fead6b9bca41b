"""One point cloud out of one file: meshes, point files, arrays and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_modal.errors import DataError, PeftModalError
from peft_modal.extras import require

SUFFIXES: tuple[str, ...] = (".npy", ".obj", ".off", ".ply", ".stl", ".txt", ".xyz")
"""What `read_cloud` reads; upper and lower case."""

_MESH_POINTS = 8192
_Reader = Callable[[Path, int, np.random.Generator], NDArray[np.generic]]


def read_cloud(path: str | Path, *, num_points: int | None = None, seed: int = 0) -> Tensor:
    """The points of a file as (P, 3) float32, in the file's own coordinates and order.

    A mesh (.obj, .off, .ply, .stl with faces) is sampled uniformly over its surface, the parts of a scene together;
    a file without faces gives its points. Text is separated by commas or white space and may carry comments and
    header lines that start with '#'. Of wider arrays and text the first three columns are taken.

    Args:
        path: File with one of SUFFIXES.
        num_points: Points to draw from a mesh (default 8192), and the most to keep of a point file (default all).
        seed: Of the draw; the same file and seed always give the same points.

    Raises:
        DataError: The file is missing, of another kind, corrupt, empty, too narrow, or holds NaN or infinity.
        MissingExtraError: A mesh or .ply file needs trimesh, which is not installed.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"'{path}' is not a point cloud file: expected one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"'{path}' does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty.")
    rng = np.random.default_rng(seed)
    values = _read(reader, path, num_points or _MESH_POINTS, rng)
    _check(path, values)
    if num_points is not None and len(values) > num_points:
        values = values[np.sort(rng.permutation(len(values))[:num_points])]
    with np.errstate(over="ignore"):
        points = torch.from_numpy(np.array(values[:, :3], dtype=np.float32))
    bad = int((~points.isfinite()).any(1).sum())
    if bad:
        raise DataError(f"'{path}' has {bad} of {len(points)} points with NaN or infinite coordinates.")
    return points


def _read(reader: _Reader, path: Path, num_points: int, rng: np.random.Generator) -> NDArray[np.generic]:
    try:
        return reader(path, num_points, rng)
    except PeftModalError:
        raise
    except Exception as error:  # trimesh lets every kind of error out of a damaged file
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


def _read_mesh(path: Path, num_points: int, rng: np.random.Generator) -> NDArray[np.generic]:
    trimesh = require("trimesh", extra="pointcloud")
    # An open file instead of a path: nothing that the file names (materials, textures) is looked up beside it.
    # process=False: else equal vertices are merged.
    with path.open("rb") as stream:
        loaded = trimesh.load(stream, file_type=path.suffix.lower()[1:], process=False)
    parts = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    meshes = [part for part in parts if len(getattr(part, "faces", ()))]
    if not meshes:
        return np.concatenate([np.empty((0, 3)), *(part.vertices for part in parts)])
    mesh = meshes[0] if len(meshes) == 1 else trimesh.util.concatenate(meshes)
    if not np.isfinite(mesh.vertices).all():
        raise DataError(f"'{path}' has vertices with NaN or infinite coordinates.")
    if not mesh.area > 0:
        raise DataError(f"'{path}' has {len(mesh.faces)} faces of area 0: there is no surface to sample.")
    points: NDArray[np.generic] = np.asarray(trimesh.sample.sample_surface(mesh, num_points, seed=rng)[0])
    return points


def _read_array(path: Path, _num_points: int, _rng: np.random.Generator) -> NDArray[np.generic]:
    # Memory mapping compares the shape in the header with the file's size before anything is allocated.
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise DataError(f"'{path}' is an archive of arrays, expected one array.")
    return values


def _read_text(path: Path, _num_points: int, _rng: np.random.Generator) -> NDArray[np.generic]:
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.partition("#")[0].strip()]
    if not lines:
        raise DataError(f"'{path}' holds no points.")
    delimiter = "," if "," in lines[0].partition("#")[0] else None
    return np.loadtxt(lines, delimiter=delimiter, comments="#", ndmin=2)


_READERS: dict[str, _Reader] = {
    ".npy": _read_array,
    ".txt": _read_text,
    ".xyz": _read_text,
    **dict.fromkeys((".obj", ".off", ".ply", ".stl"), _read_mesh),
}
