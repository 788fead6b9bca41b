"""Which files of a folder or a CSV belong to which class and split; nothing is opened here but the CSV."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError, DataError, nearest

SPLITS = ("train", "val", "test")
"""Names of the folders that hold splits."""


@dataclass(frozen=True)
class Item:
    """A file and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class FolderIndex:
    """The files of the three splits; `test` and `val` may be empty."""

    class_names: tuple[str, ...]
    """An item's label is the place of its class here."""
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]


@dataclass(frozen=True)
class _Entry:
    path: Path
    class_name: str
    split: str
    """One of the splits, or empty: still to be split."""


def scan_folder(
    root: str | Path, *, suffixes: Sequence[str], val_share: float = 0.1, test_share: float = 0.2, seed: int = 0
) -> FolderIndex:
    """Index `DIR/{train,val,test}/<class>/...`, `DIR/<class>/...`, or a CSV file with `path,label[,split]`.

    Without splits, each class is split by the seed, so that adding a class or a copy of the folder elsewhere leaves
    the others' splits as they are. With splits but without `val`, a share of each class of `train` is held out.
    Hidden files and folders are passed over. Paths in a CSV are relative to it. Class names are sorted, and the files
    of a split ordered by class and path.

    Args:
        root: The folder or the CSV file.
        suffixes: File endings to take, with their dot; case does not matter.
        val_share: Share of each class held out for validation, at least one file unless it is 0.
        test_share: Share of each class held out for testing, likewise; unused where there are splits.
        seed: Of the split.

    Raises:
        ConfigError: A share is outside 0..1, or they leave nothing to train on.
        DataError: The folder, its files or the CSV cannot serve; the message says what was found.
    """
    if not (0 <= val_share < 1 and 0 <= test_share < 1 and val_share + test_share < 1):
        raise ConfigError(
            f"data: val_share {val_share} and test_share {test_share} must be in 0..1 and leave a share for training."
        )
    root = Path(root)
    suffixes = [s.lower() for s in suffixes]
    if root.is_dir():
        entries = _scan_directory(root, suffixes)
    elif root.suffix.lower() == ".csv":
        entries = _read_csv(root, suffixes)
    else:
        raise DataError(f"'{root}' is neither a folder nor a CSV file.")
    names = {e.class_name for e in entries if e.split in {"", "train"}}
    for entry in entries:
        if entry.class_name not in names:
            raise DataError(f"'{root}': class '{entry.class_name}' occurs in {entry.split} but not in train.")
    by_class: dict[str, list[_Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda e: (e.class_name, e.path.as_posix())):
        by_class[entry.class_name].append(entry)
    has_splits = any(e.split for e in entries)
    shares = {"test": 0.0 if has_splits else test_share, "val": val_share}
    if any(e.split == "val" for e in entries):
        shares["val"] = 0.0
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for label, name in enumerate(sorted(by_class)):
        for entry in _hold_out(root, by_class[name], shares, seed):
            items[entry.split].append(Item(entry.path, label))
    return FolderIndex(tuple(sorted(by_class)), *(tuple(items[split]) for split in SPLITS))


def list_files(path: str | Path, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The file itself, or all files below a folder with one of these endings, sorted by path.

    Raises:
        DataError: The path does not exist, or there is no such file.
    """
    path = Path(path)
    suffixes = [s.lower() for s in suffixes]
    if not path.exists():
        raise DataError(f"'{path}' does not exist.")
    if path.is_dir():
        files = files_below(path, suffixes)
        if not files:
            raise DataError(f"'{path}' holds no {_either(suffixes)} files; found {_found(path)}.")
        return files
    if path.suffix.lower() not in suffixes:
        raise DataError(f"'{path}' is not a {_either(suffixes)} file.")
    return (path,)


def visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones and those in hidden folders.

    Yields:
        Their paths, in no order.
    """
    for path in folder.rglob("*"):
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def files_below(folder: Path, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The visible files below a folder with one of these endings (in lower case), sorted by path."""
    return tuple(sorted(p for p in visible_files(folder) if p.suffix.lower() in suffixes))


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))


def _either(suffixes: Sequence[str]) -> str:
    return " or ".join(suffixes)


def _found(folder: Path) -> str:
    counts = Counter(p.suffix.lower() or "files without ending" for p in visible_files(folder))
    return ", ".join(f"{suffix} ({n})" for suffix, n in counts.most_common(6)) or "no files at all"


def _scan_directory(root: Path, suffixes: Sequence[str]) -> list[_Entry]:
    if not files_below(root, suffixes):
        raise DataError(f"'{root}' holds no {_either(suffixes)} files; found {_found(root)}.")
    folders = _visible_folders(root)
    if not folders:
        raise DataError(f"'{root}' has no folder per class: put the files into '{root.name}/<class>/'.")
    if not _has_splits(folders, suffixes):
        return _entries(folders, suffixes, split="")
    entries: list[_Entry] = []
    for folder in folders:
        if folder.name in SPLITS:
            classes = _visible_folders(folder)
            if not classes:
                raise DataError(f"'{folder}' has no folder per class: put the files into '{folder.name}/<class>/'.")
            entries += _entries(classes, suffixes, split=folder.name)
        elif files_below(folder, suffixes):
            raise DataError(
                f"'{root}' has splits, and '{folder.name}' is not one of them: {nearest(folder.name, SPLITS)}"
            )
    return entries


def _has_splits(folders: Sequence[Path], suffixes: Sequence[str]) -> bool:
    """Whether the folders are splits; among others, a `train` that holds files itself is a class of that name."""
    train = next((f for f in folders if f.name == "train"), None)
    if all(f.name in SPLITS for f in folders):
        return True
    return (
        train is not None
        and bool(_visible_folders(train))
        and all(p.parent != train for p in files_below(train, suffixes))
    )


def _entries(classes: Sequence[Path], suffixes: Sequence[str], *, split: str) -> list[_Entry]:
    entries = []
    for folder in classes:
        files = files_below(folder, suffixes)
        if not files:
            raise DataError(f"class folder '{folder}' holds no {_either(suffixes)} files; found {_found(folder)}.")
        entries += [_Entry(path, folder.name, split) for path in files]
    return entries


def _read_csv(table: Path, suffixes: Sequence[str]) -> list[_Entry]:
    if not table.is_file():
        raise DataError(f"'{table}' does not exist.")
    entries: list[_Entry] = []
    seen: dict[Path, int] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = reader.fieldnames or []
            if "path" not in columns or "label" not in columns:
                raise DataError(
                    f"'{table}' needs the columns path,label[,split] in its first line, found: {', '.join(columns)}."
                )
            for row in reader:
                where = f"'{table}', line {reader.line_num}"
                entry = _entry_of_row(row, table.parent, suffixes, where, has_splits="split" in columns)
                if entry.path in seen:
                    raise DataError(f"{where}: '{row['path']}' is already named in line {seen[entry.path]}.")
                seen[entry.path] = reader.line_num
                entries.append(entry)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"'{table}' cannot be read as CSV: {error}") from error
    if not entries:
        raise DataError(f"'{table}' names no files.")
    return entries


def _entry_of_row(
    row: dict[str, str | None], folder: Path, suffixes: Sequence[str], where: str, *, has_splits: bool
) -> _Entry:
    name, label, split = ((row.get(key) or "").strip() for key in ("path", "label", "split"))
    if not name or not label:
        raise DataError(f"{where}: path and label must both be given, found '{name}' and '{label}'.")
    path = folder / name
    if not path.is_file():
        raise DataError(f"{where}: the file '{path}' does not exist.")
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{where}: '{name}' is not a {_either(suffixes)} file.")
    if has_splits and split not in SPLITS:
        raise DataError(f"{where}: split is '{split}', expected train, val or test.")
    return _Entry(path, label, split)


def _hold_out(root: Path, entries: list[_Entry], shares: dict[str, float], seed: int) -> list[_Entry]:
    """Entries of one class with every split filled in, in their order.

    Raises:
        DataError: Nothing would be left to train on.
    """
    name = entries[0].class_name
    open_at = [i for i, e in enumerate(entries) if e.split in {"", "train"}]
    counts = {split: max(1, round(share * len(open_at))) if share else 0 for split, share in shares.items()}
    if sum(counts.values()) >= len(open_at):
        wanted = " and ".join(f"{n} for {split}" for split, n in counts.items() if n)
        raise DataError(
            f"'{root}': class '{name}' has {len(open_at)} files; holding out {wanted} leaves none to train on. "
            "Add files, or set the share to 0."
        )
    order = torch.randperm(len(open_at), generator=seeded("split", seed, name)).tolist()
    splits = [e.split or "train" for e in entries]
    taken = 0
    for split, count in counts.items():
        for i in order[taken : taken + count]:
            splits[open_at[i]] = split
        taken += count
    return [_Entry(e.path, e.class_name, split) for e, split in zip(entries, splits, strict=True)]
