"""Tiny tracking data sets on disk, in the layouts of the benchmarks: a bright square on a dark ground."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 40


def square(x: int, y: int, width: int = 8, height: int = 6) -> Image.Image:
    """A frame whose pixels x to x + width, y to y + height are white."""
    pixels = np.full((SIDE, SIDE + 8, 3), 30, dtype=np.uint8)
    pixels[y : y + height, x : x + width] = 255
    return Image.fromarray(pixels)


def places(count: int) -> list[tuple[int, int]]:
    """Left upper corners of a square that moves."""
    return [(5 + 2 * i, 8 + i) for i in range(count)]


def write_frames(folder: Path, names: Sequence[str]) -> None:
    """A frame for each name, the square moving on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in zip(names, places(len(names)), strict=True):
        square(x, y).save(folder / name)


def box_lines(count: int, *, delimiter: str = ",", shift: int = 0, digits: int = 2) -> str:
    """x, y, w, h of every frame, x and y counted from `shift`."""
    return "".join(
        delimiter.join(f"{value:.{digits}f}" for value in (x + shift, y + shift, 8, 6)) + "\n" for x, y in places(count)
    )


def write_got10k(folder: Path, count: int = 4, *, cover: str | None = None, first_only: bool = False) -> None:
    """One sequence of GOT-10k."""
    write_frames(folder, [f"{i + 1:08d}.png" for i in range(count)])
    (folder / "groundtruth.txt").write_text(box_lines(1 if first_only else count, digits=4))
    if cover is not None:
        (folder / "cover.label").write_text("\n".join(cover) + "\n")
        (folder / "absence.label").write_text("\n".join("01"[c == "0"] for c in cover) + "\n")
        (folder / "meta_info.ini").write_text("[METAINFO]\nobject_class: square\nanno_fps: 10Hz\n")


def write_lasot(folder: Path, count: int = 4, *, extra: int = 0, hidden: str = "", outside: str = "") -> None:
    """One sequence of LaSOT, counted from 1; `extra` pictures have no box."""
    write_frames(folder / "img", [f"{i + 1:08d}.png" for i in range(count + extra)])
    (folder / "groundtruth.txt").write_text(box_lines(count, shift=1, digits=0))
    (folder / "full_occlusion.txt").write_text(",".join(hidden or "0" * count))
    (folder / "out_of_view.txt").write_text(",".join(outside or "0" * count))


def write_trackingnet(chunk: Path, name: str, count: int = 12, *, first_only: bool = False) -> None:
    """One sequence of TrackingNet; frames are not padded with zeros."""
    write_frames(chunk / "frames" / name, [f"{i}.png" for i in range(count)])
    (chunk / "anno").mkdir(parents=True, exist_ok=True)
    (chunk / "anno" / f"{name}.txt").write_text(box_lines(1 if first_only else count))


def write_otb(
    folder: Path, numbers: Sequence[int], files: dict[str, str] | None = None, *, delimiter: str = ","
) -> None:
    """One folder of OTB: pictures with these numbers, and truth files."""
    write_frames(folder / "img", [f"{i:04d}.png" for i in numbers])
    for name, text in (files or {"groundtruth_rect.txt": box_lines(len(numbers), delimiter=delimiter)}).items():
        (folder / name).write_text(text)


def write_own(folder: Path, count: int = 4, *, absent: str = "") -> None:
    """A sequence of one's own."""
    write_frames(folder, [f"frame{i}.png" for i in range(count)])
    (folder / "groundtruth.txt").write_text(box_lines(count))
    if absent:
        (folder / "absence.txt").write_text("\n".join(absent))
