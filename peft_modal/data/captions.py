"""Which images of a folder have which captions, and which are for training; no image is opened here."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from peft_modal.data.folder import SPLITS, list_files, visible_files
from peft_modal.data.images import SUFFIXES
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)

METADATA: Final = "metadata.jsonl"
BESIDE: Final = (".txt", ".caption")
"""Endings of a file of the image's own name that holds its caption."""


@dataclass(frozen=True)
class Captioned:
    """An image file and what it shows."""

    path: Path
    captions: tuple[str, ...]
    """At least one. Training takes any of them, evaluation the first."""


@dataclass(frozen=True)
class CaptionIndex:
    """The images of the three splits, each ordered by path; `val` and `test` may be empty."""

    train: tuple[Captioned, ...]
    val: tuple[Captioned, ...] = ()
    test: tuple[Captioned, ...] = ()


def scan_captions(
    root: str | Path,
    *,
    caption: str | None = None,
    column: str = "text",
    allow_empty: bool | None = False,
    one_per_line: bool = False,
    val_share: float = 0.05,
    seed: int = 0,
) -> CaptionIndex:
    """Index the images below a folder: `DIR/{train,val,test}/...`, or all together and split by the seed.

    An image's caption stands in a `metadata.jsonl` in its folder or one above it (a line for each image,
    `{"file_name": "a.png", "text": "a red house"}`, the file name relative to it, the caption a text or a list of
    them), or in `a.txt` or `a.caption` beside it. White space within a caption counts as one space. Hidden files and
    folders are passed over.

    Args:
        root: The folder.
        caption: The caption of all images, whatever stands beside them.
        column: Key of the captions in `metadata.jsonl`.
        allow_empty: Take empty captions from files as they are. None: refuse them, and do not advise this or `caption`,
            for callers that have no such settings.
        one_per_line: Take each line of a file beside an image that holds anything for a caption of its own.
        val_share: Share of the training images held out for validation where there is no `val`, rounded down: with
            5 %, none of 19 images and one of 20.
        seed: Of the images held out.

    Raises:
        ConfigError: The share is outside of 0..1, or leaves nothing to train on.
        DataError: The folder, its images or its captions cannot serve; the message names the file.
    """
    root = Path(root)
    if root.is_file():
        raise DataError(f"'{root}' is a file, expected a folder of images.")
    images = list_files(root, SUFFIXES)
    _tell_passed_over(root)
    parts = _parts(root, images)
    found = (
        dict.fromkeys(images, (_text(caption, "data.caption", allow_empty=True),))
        if caption is not None
        else _captions(root, images, column, allow_empty=allow_empty, one_per_line=one_per_line)
    )
    splits = {name: [Captioned(path, found[path]) for path in images if parts[path] == name] for name in SPLITS}
    return _with_validation(splits, val_share, seed)


def read_caption_csv(
    table: str | Path, *, column: str = "caption", val_share: float = 0.05, seed: int = 0
) -> CaptionIndex:
    """Index the images that a CSV `path,caption[,split]` names; an image may have a line for each of its captions.

    Args:
        table: The file; its paths are relative to it.
        column: That of the captions.
        val_share: See `scan_captions`.
        seed: See `scan_captions`.

    Raises:
        ConfigError: The share is outside of 0..1.
        DataError: The file is missing, no CSV, or a line of it cannot serve; the message says which.
    """
    table = Path(table)
    if not table.is_file():
        raise DataError(f"'{table}' does not exist.")
    captions: dict[Path, tuple[str, ...]] = {}
    parts: dict[Path, str] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = reader.fieldnames or []
            if "path" not in columns or column not in columns:
                raise DataError(
                    f"'{table}' needs the columns path,{column}[,split] in its first line, found: {', '.join(columns)}."
                )
            for row in reader:
                where = f"'{table}', line {reader.line_num}"
                path, part = _place(row, table.parent, where, has_splits="split" in columns)
                if parts.setdefault(path, part) != part:
                    raise DataError(f"{where}: '{row['path']}' is in '{parts[path]}' already, and here in '{part}'.")
                text = _text(row.get(column) or "", where, allow_empty=None)
                captions[path] = (*captions.get(path, ()), text)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"'{table}' cannot be read as CSV: {error}") from error
    if not captions:
        raise DataError(f"'{table}' names no images.")
    splits = {
        name: [Captioned(path, captions[path]) for path in sorted(captions) if parts[path] == name] for name in SPLITS
    }
    return _with_validation(splits, val_share, seed)


def _place(
    row: Mapping[str, str | None], folder: Path, where: str, *, has_splits: bool
) -> tuple[Path, str]:  # fmt: skip
    """The image of a line and its split.

    Raises:
        DataError: There is no such image or no such split.
    """
    name = (row.get("path") or "").strip()
    path = folder / name
    if not name or not path.is_file():
        raise DataError(f"{where}: the image '{path}' does not exist.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{where}: '{name}' is no image by its ending.")
    part = (row.get("split") or "").strip() if has_splits else "train"
    if part not in SPLITS:
        raise DataError(f"{where}: split is '{part}', expected train, val or test.")
    return path, part


def _with_validation(splits: Mapping[str, Sequence[Captioned]], val_share: float, seed: int) -> CaptionIndex:
    """The splits, with a share of the training images held out where there is nothing to validate on.

    Raises:
        ConfigError: The share is outside of 0..1.
    """
    if not 0 <= val_share < 1:
        raise ConfigError(f"data: val_share is {val_share}, expected 0 or more and less than 1.")
    train, val = splits["train"], splits["val"]
    if not val:
        order = torch.randperm(len(train), generator=seeded("split", seed)).tolist()
        held_out = set(order[: math.floor(val_share * len(order) + 1e-9)])  # 0.29 * 100 is a little below 29
        val = [image for i, image in enumerate(train) if i in held_out]
        train = [image for i, image in enumerate(train) if i not in held_out]
    return CaptionIndex(tuple(train), tuple(val), tuple(splits["test"]))


def _tell_passed_over(root: Path) -> None:
    known = {*SUFFIXES, *BESIDE, ".json", ".jsonl", ".csv", ".md", ""}
    suffixes = (path.suffix.lower() for path in visible_files(root))
    passed_over = Counter(suffix for suffix in suffixes if suffix not in known)
    if passed_over:
        listed = ", ".join(f"{suffix} ({count})" for suffix, count in passed_over.most_common())
        _LOG.warning("'%s': files of kinds that are not read here are passed over: %s", root, listed)


def _parts(root: Path, images: Sequence[Path]) -> dict[Path, str]:
    """The split that each image's folder names; `train` where there are no such folders.

    Raises:
        DataError: Only some are in one.
    """
    folders = {path: path.relative_to(root).parts[0] for path in images if path.parent != root}
    if "train" not in folders.values():
        return dict.fromkeys(images, "train")
    for path in images:
        if folders.get(path) not in SPLITS:
            raise DataError(
                f"'{path}' lies outside of the splits: where there is a folder 'train', every image belongs into "
                "'train', 'val' or 'test'."
            )
    return folders


def _captions(
    root: Path, images: Sequence[Path], column: str, *, allow_empty: bool | None, one_per_line: bool
) -> dict[Path, tuple[str, ...]]:  # fmt: skip
    """The captions of every image.

    Raises:
        DataError: An image has none, or two that differ.
    """
    tables = sorted(path for path in visible_files(root) if path.name == METADATA)
    listed = _read_tables(tables, frozenset(images), column, allow_empty=allow_empty)
    found, missing = {}, []
    for path in images:
        sources = {listed[path][0]: listed[path][1]} if path in listed else {}
        for text in (path.with_suffix(suffix) for suffix in BESIDE):
            if text.is_file():
                sources[f"'{text}'"] = _beside(text, allow_empty=allow_empty, one_per_line=one_per_line)
        if len(set(sources.values())) > 1:
            raise DataError(f"'{path}' has different captions in {' and '.join(sources)}: remove one of them.")
        if sources:
            found[path] = next(iter(sources.values()))
        else:
            missing.append(path)
    if missing:
        first, count = missing[0], len(missing)
        advice = "" if allow_empty is None else ", or give one for all as data.caption"
        raise DataError(
            f"'{first}' has no caption{f' ({count} images have none)' if count > 1 else ''}: name it in "
            f"'{tables[0] if tables else root / METADATA}', write its caption into "
            f"'{first.with_suffix('.txt').name}' beside it{advice}."
        )
    return found


def _beside(file: Path, *, allow_empty: bool | None, one_per_line: bool) -> tuple[str, ...]:
    """The captions in a file beside an image."""
    content = _content(file)
    lines = [line for line in content.split("\n") if line.strip()] if one_per_line else []
    return tuple(_text(text, f"'{file}'", allow_empty=allow_empty) for text in lines or [content])


def _read_tables(
    tables: Iterable[Path], images: frozenset[Path], column: str, *, allow_empty: bool | None
) -> dict[Path, tuple[str, tuple[str, ...]]]:
    """Place and captions of every image that the tables name.

    Raises:
        DataError: A line cannot be used.
    """
    listed: dict[Path, tuple[str, tuple[str, ...]]] = {}
    for table in tables:
        # Not `splitlines`: texts may hold line separators of Unicode.
        for number, line in enumerate(_content(table).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"'{table}', line {number}"
            row = _row(line, where)
            path = _image_of(row, table.parent, images, where)
            if path in listed:
                raise DataError(f"{where}: '{row['file_name']}' is already named in {listed[path][0]}.")
            listed[path] = where, _texts(row, column, where, allow_empty=allow_empty)
    return listed


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def _row(line: str, where: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f'{where} is no JSON object, expected {{"file_name": ..., ...}}.')
    return row


def _image_of(row: Mapping[str, object], folder: Path, images: frozenset[Path], where: str) -> Path:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has no 'file_name' (it has: {', '.join(row) or 'nothing'}).")
    path = folder / name
    if path not in images:
        raise DataError(f"{where}: there is no image '{name}' below '{folder}'.")
    return path


def _texts(row: Mapping[str, object], column: str, where: str, *, allow_empty: bool | None) -> tuple[str, ...]:
    if column not in row:
        raise DataError(
            f"{where} has no '{column}' (it has: {', '.join(row)}); name the captions' key as data.caption_column."
        )
    value = row[column]
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if not texts or len(texts) < len(values):
        raise DataError(f"{where}: '{column}' is {json.dumps(value)[:60]}, expected a text or a list of texts.")
    return tuple(_text(text, f"{where}, '{column}'", allow_empty=allow_empty) for text in texts)


def _text(text: str, where: str, *, allow_empty: bool | None) -> str:
    """A caption with its white space as single spaces.

    Raises:
        DataError: It is empty and must not be, or holds half of a character.
    """
    text = " ".join(text.split())
    if not text and not allow_empty:
        advice = "" if allow_empty is None else ", or set data.allow_empty to train without words"
        raise DataError(f"{where}: the caption is empty; write one{advice}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start + 1} of the caption is half of a surrogate pair.") from error
    return text
