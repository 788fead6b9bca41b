"""A few training pictures of each class, drawn as CoOp draws them, and the half of the classes that is trained on.

Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134; the halves are those of
Conditional Prompt Learning, CVPR 2022, arXiv:2203.05557
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from peft_modal.data.pickles import read_pickle
from peft_modal.errors import DataError
from peft_modal_clip.splits import Entry, Split, entries_of
from peft_modal_vision.lists import read_json

Classes = Literal["all", "base", "new"]
VAL_SHOTS: Final = 4
"""The most of each class that are kept to validate on."""
_RECORDS: Final = ("dassl.data.datasets.base_dataset.Datum", "dassl.data.datasets.Datum", "datasets.utils.Datum")
"""Classes whose objects the authors' pickles hold."""


def draw_shots(split: Split, shots: int | None, seed: int) -> Split:
    """A split with `shots` training pictures of each class, and as many to validate on, at most four.

    Python's random numbers begin with the seed; classes come in the order in which the list first names them, first
    those of training, then those of validation; a class with fewer pictures gives all of them. None keeps everything.
    """
    if shots is None:
        return split
    generator = random.Random(seed)  # noqa: S311 — the stream that published shots come from
    train = _few(split.train, shots, generator)
    return replace(split, train=train, val=_few(split.val, min(shots, VAL_SHOTS), generator))


def _few(entries: Sequence[Entry], count: int, generator: random.Random) -> tuple[Entry, ...]:
    members: dict[int, list[Entry]] = {}
    for entry in entries:
        members.setdefault(entry.label, []).append(entry)
    drawn: list[Entry] = []
    for of_class in members.values():
        drawn += generator.sample(of_class, count) if len(of_class) >= count else of_class
    return tuple(drawn)


def read_shots(path: Path, split: Split, *, allow_pickle: bool) -> Split:
    """A split whose training and validation pictures are those of a file.

    Args:
        path: A `data.json` that a run left, or a pickle `shot_<K>-seed_<S>.pkl` of the authors' code.
        split: What they are from. Paths of a pickle begin with a folder of another machine, which is ignored.
        allow_pickle: The user's `data.allow_pickle`.

    Raises:
        ConfigError: It is a pickle, which the user has not allowed to open.
        DataError: It is of another form, or names pictures that the split does not have.
    """
    if path.suffix.lower() == ".json":
        found = read_json(path)
        parts = {name: _listed(found, name, path) for name in ("train", "val")}
    else:
        found = read_pickle(path, allowed=allow_pickle, records=_RECORDS)
        parts = {name: _pickled(found, name, path) for name in ("train", "val")}
    known = {entry.path: entry for part in (split.train, split.val) for entry in part}
    train, val = ([_known(entry, known, path) for entry in parts[name]] for name in ("train", "val"))
    if not train:
        raise DataError(f"'{path}' names no pictures to train on.")
    return replace(split, train=tuple(train), val=tuple(val))


def _listed(found: Any, name: str, path: Path) -> tuple[Entry, ...]:  # noqa: ANN401 — parsed JSON
    if not isinstance(found, Mapping) or not isinstance(found.get(name), list):
        raise DataError(f"'{path}' must hold the lists 'train' and 'val', as a run's data.json does.")
    return entries_of(found[name], f"'{path}', {name}")


def _pickled(found: Any, name: str, path: Path) -> tuple[Entry, ...]:  # noqa: ANN401 — what lay in the pickle
    # Of ImageNet, which has nothing to validate on, the authors keep the training pictures alone.
    rows = found.get(name, [] if name == "val" else None) if isinstance(found, Mapping) else None
    keys = ("_impath", "_label", "_classname")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row.keys() >= {*keys} for row in rows):
        raise DataError(f"'{path}' holds no list '{name}' of pictures as the code of CoOp pickles them.")
    return entries_of([[row[key] for key in keys] for row in rows], f"'{path}', {name}")


def _known(entry: Entry, known: Mapping[str, Entry], path: Path) -> Entry:
    """The entry of the split that a file means.

    Raises:
        DataError: There is none, or its class is another.
    """
    steps = entry.path.split("/")
    own = next((found for i in range(len(steps)) if (found := known.get("/".join(steps[i:])))), None)
    if own is None or own.label != entry.label:
        reason = "it is not in the split" if own is None else f"its label is {own.label} in the split"
        raise DataError(f"'{path}' names '{entry.path}' with the label {entry.label}, and {reason}.")
    return own


def cut_classes(
    split: Split, class_names: tuple[str, ...], classes: Classes
) -> tuple[Split, tuple[str, ...]]:  # fmt: skip
    """The half of the classes that is asked for: the first in label order (of an odd number one more), or the rest.

    Of `base` the test part stays whole, and so do the names: what becomes of the other classes is measured with it.
    `new` is the rest alone, counted from 0.
    """
    count = math.ceil(len(class_names) / 2)
    if classes == "base":
        train, val = (tuple(entry for entry in part if entry.label < count) for part in (split.train, split.val))
        return Split(train, val, split.test), class_names
    if classes == "new":
        parts = [
            tuple(replace(entry, label=entry.label - count) for entry in part if entry.label >= count) for part in split
        ]
        return Split(*parts), class_names[count:]
    return split, class_names
