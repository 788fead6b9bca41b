"""How the splits of CoOp are made from the files that the data sets were published as.

Every function returns paths relative to the set's folder of pictures. Where pictures are divided at random, the numbers
follow from the name of the set alone: every run makes the same split of the same files. It is not the published one.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from peft_modal.data.images import SUFFIXES
from peft_modal.errors import DataError
from peft_modal.extras import require
from peft_modal_clip.splits import Entry, Split
from peft_modal_vision.lists import lines_of, read_json

Maker = Callable[[Path, Path], Split]
"""From the folder of a set and its folder of pictures to a split."""
_T = TypeVar("_T")

CALTECH_NAMES: Final = {
    "airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",
}  # fmt: skip
CALTECH_IGNORED: Final = ("BACKGROUND_Google", "Faces_easy")
EUROSAT_NAMES: Final = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "River": "River",
    "SeaLake": "Sea or Lake",
}  # fmt: skip


# Divided at random.


def by_class(*, seed: str, ignored: Collection[str] = (), names: Mapping[str, str] | None = None) -> Maker:
    """A maker that gives half of each class folder to training and a fifth to validation.

    Args:
        seed: Of the division.
        ignored: Folders that are no classes.
        names: Other names for some classes.
    """

    def make(folder: Path, images: Path) -> Split:
        del folder
        classes = [path for path in class_folders(images) if path.name not in ignored]
        groups = {
            (label, (names or {}).get(path.name, path.name)): pictures_of(path, images)
            for label, path in enumerate(classes)
        }
        return _halved(groups, seed, images)

    return make


def flowers(folder: Path, images: Path) -> Split:
    """Oxford Flowers by `imagelabels.mat` and `cat_to_name.json`; divided as class folders are, not as published.

    Raises:
        DataError: A file is missing or cannot serve.
    """
    del images
    table = folder / "cat_to_name.json"
    names = read_json(table)
    labels = _matlab(folder / "imagelabels.mat", "labels").reshape(-1).tolist()
    groups: dict[tuple[int, str], list[str]] = {}
    for number, label in enumerate(labels, start=1):
        if not isinstance(names, Mapping) or not isinstance(names.get(str(label)), str):
            raise DataError(f"'{table}' has no name for class {label}.")
        groups.setdefault((int(label) - 1, names[str(label)]), []).append(f"image_{number:05d}.jpg")
    return _halved(groups, "oxford_flowers", folder)


def _halved(groups: Mapping[tuple[int, str], Iterable[str]], seed: str, where: Path) -> Split:
    """Half, a fifth and the rest of each class.

    Raises:
        DataError: A class is too small for that.
    """
    generator = random.Random(f"split of {seed}")  # noqa: S311 — no secret
    parts: tuple[list[Entry], list[Entry], list[Entry]] = ([], [], [])
    for (label, name), paths in groups.items():
        shuffled = [Entry(path, label, name) for path in paths]
        generator.shuffle(shuffled)
        num_train, num_val = round(0.5 * len(shuffled)), round(0.2 * len(shuffled))
        divided = shuffled[:num_train], shuffled[num_train : num_train + num_val], shuffled[num_train + num_val :]
        if not all(divided):
            raise DataError(
                f"'{where}': class '{name}' has {len(shuffled)} pictures, too few to divide among training (half), "
                "validation (a fifth) and test; put the published split file there, or add pictures."
            )
        for part, entries in zip(parts, divided, strict=True):
            part.extend(entries)
    return Split(*map(tuple, parts))


def _with_validation(trainval: Iterable[Entry], test: Iterable[Entry], seed: str, where: Path) -> Split:
    """A published test part, and a fifth of each class of the rest held out for validation.

    Raises:
        DataError: A class is too small for that.
    """
    generator = random.Random(f"split of {seed}")  # noqa: S311 — no secret
    members: dict[int, list[Entry]] = {}
    for entry in trainval:
        members.setdefault(entry.label, []).append(entry)
    train: list[Entry] = []
    val: list[Entry] = []
    for entries in members.values():
        count = round(0.2 * len(entries))
        if not count:
            raise DataError(
                f"'{where}': class '{entries[0].name}' has {len(entries)} pictures to train on, too few to hold a "
                "fifth out for validation; put the published split file there, or add pictures."
            )
        generator.shuffle(entries)
        val += entries[:count]
        train += entries[count:]
    return Split(tuple(train), tuple(val), tuple(test))


def pets(folder: Path, images: Path) -> Split:
    """Oxford-IIIT Pet by `annotations/trainval.txt` and `test.txt`."""
    del images

    def read(name: str) -> list[Entry]:
        made = []
        for where, line in _numbered_lines(folder / "annotations" / name):
            picture, _, rest = line.partition(" ")
            label = _number(rest.partition(" ")[0], where, line) - 1
            made.append(Entry(f"{picture}.jpg", label, picture.rpartition("_")[0].lower()))
        return made

    return _with_validation(read("trainval.txt"), read("test.txt"), "oxford_pets", folder)


def cars(folder: Path, images: Path) -> Split:
    """Stanford Cars by the annotations of its devkit; the year of a class goes to the front of its name.

    Raises:
        DataError: A file is missing or cannot serve.
    """
    del images
    names = [_text(name) for name in _matlab(folder / "devkit" / "cars_meta.mat", "class_names").reshape(-1)]
    names = [" ".join([*name.split(" ")[-1:], *name.split(" ")[:-1]]) for name in names]

    def read(pictures: str, table: Path) -> list[Entry]:
        made = []
        for row in _matlab(table, "annotations").reshape(-1):
            label = int(row["class"].reshape(-1)[0]) - 1
            if not 0 <= label < len(names):
                raise DataError(f"'{table}': there is no class {label + 1} among {len(names)}.")
            made.append(Entry(f"{pictures}/{_text(row['fname'])}", label, names[label]))
        return made

    trainval = read("cars_train", folder / "devkit" / "cars_train_annos.mat")
    test = read("cars_test", folder / "cars_test_annos_withlabels.mat")
    return _with_validation(trainval, test, "stanford_cars", folder)


def sun397(folder: Path, images: Path) -> Split:
    """SUN397 by `ClassName.txt`, `Training_01.txt` and `Testing_01.txt`.

    A class's path is read backwards without its first letter: /c/church/outdoor is an outdoor church.
    """
    del images
    paths = [line.removeprefix("/") for _, line in _numbered_lines(folder / "ClassName.txt")]
    labels = {path: label for label, path in enumerate(paths)}

    def read(name: str) -> list[Entry]:
        made = []
        for where, line in _numbered_lines(folder / name):
            picture = line.removeprefix("/")
            path = picture.rpartition("/")[0]
            made.append(Entry(picture, _at(labels, path, where), " ".join(path.split("/")[:0:-1])))
        return made

    return _with_validation(read("Training_01.txt"), read("Testing_01.txt"), "sun397", folder)


def ucf101(folder: Path, images: Path) -> Split:
    """UCF101's middle frames by the first of its three published splits; CamelCase is divided by `_`."""
    del images
    lists = folder / "ucfTrainTestlist"
    labels = {}
    for where, line in _numbered_lines(lists / "classInd.txt"):
        number, _, name = line.partition(" ")
        labels[name.strip()] = _number(number, where, line) - 1

    def read(name: str) -> list[Entry]:
        made = []
        for where, line in _numbered_lines(lists / name):
            action, _, video = line.split(" ")[0].partition("/")
            words = "_".join(re.findall("[A-Z][^A-Z]*", action))
            made.append(Entry(f"{words}/{video.replace('.avi', '.jpg')}", _at(labels, action, where), words))
        return made

    return _with_validation(read("trainlist01.txt"), read("testlist01.txt"), "ucf101", folder)


# Published as they are.


def aircraft(folder: Path, images: Path) -> Split:
    """FGVC-Aircraft's own three lists of variants; a label is the line of its variant in `variants.txt`."""
    del images
    labels = {line: label for label, (_, line) in enumerate(_numbered_lines(folder / "variants.txt"))}

    def read(part: str) -> tuple[Entry, ...]:
        made = []
        for where, line in _numbered_lines(folder / f"images_variant_{part}.txt"):
            picture, _, variant = line.partition(" ")
            made.append(Entry(f"{picture}.jpg", _at(labels, variant, where), variant))
        return tuple(made)

    return Split(read("train"), read("val"), read("test"))


def imagenet(folder: Path, images: Path) -> Split:
    """ImageNet: `train`, and `val` as the test part; there are no pictures to validate on."""
    names = synset_names(folder)
    train, test = (_synsets(images / part, images, names) for part in ("train", "val"))
    return Split(train, (), test)


def imagenet_v2(folder: Path, images: Path) -> Split:
    """ImageNetV2: a folder is the number of a line of `classnames.txt`."""
    names = list(synset_names(folder).values())
    test = []
    for label, name in enumerate(names):
        test += [Entry(path, label, name) for path in pictures_of(images / str(label), images)]
    return Split((), (), tuple(test))


def imagenet_variant(folder: Path, images: Path) -> Split:
    """Sketches, adversarial pictures and renditions: folders of synsets, 1000 or 200 of them, counted from 0."""
    return Split((), (), _synsets(images, images, synset_names(folder)))


def synset_names(folder: Path) -> dict[str, str]:
    """Names of synsets by `classnames.txt` of a set, or of ImageNet beside it, in the file's order.

    Raises:
        DataError: There is no such file, or a line is not of the form.
    """
    table = folder / "classnames.txt"
    if not table.is_file() and (folder.parent / "imagenet" / "classnames.txt").is_file():
        table = folder.parent / "imagenet" / "classnames.txt"
    if not table.is_file():
        raise DataError(
            f"'{table}' does not exist: it names the classes (a line is 'n01440764 tench'), and names of synsets "
            "are worse prompts by several points."
        )
    names = {}
    for where, line in _numbered_lines(table):
        synset, _, name = line.partition(" ")
        if not name.strip():
            raise DataError(f"{where}: expected a synset, a space and a name, found '{line}'.")
        names[synset] = name.strip()
    return names


def _synsets(folder: Path, images: Path, names: Mapping[str, str]) -> tuple[Entry, ...]:
    made = []
    for label, path in enumerate(class_folders(folder)):
        name = _at(names, path.name, f"'{path}'")
        made += [Entry(picture, label, name) for picture in pictures_of(path, images)]
    return tuple(made)


# Files.


def class_folders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by the order of their names.

    Raises:
        DataError: There are none.
    """
    found = folder.iterdir() if folder.is_dir() else ()
    folders = sorted(path for path in found if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
    if not folders:
        raise DataError(f"'{folder}' has no folders of classes.")
    return folders


def pictures_of(folder: Path, images: Path) -> list[str]:
    """Paths of the pictures in a folder, relative to `images`, sorted.

    Raises:
        DataError: There are none.
    """
    if not folder.is_dir():
        raise DataError(f"'{folder}' does not exist.")
    # ImageNet has more than a million: names are taken from the folder, no file is looked at.
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    pictures = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    if not pictures:
        raise DataError(f"'{folder}' holds no pictures of its class.")
    below = folder.relative_to(images).as_posix()
    return [f"{below}/{name}" for name in pictures]


def _numbered_lines(table: Path) -> list[tuple[str, str]]:
    """The lines of a list, each with its place for error messages."""
    return [(f"'{table}', line {number}", line) for number, line in lines_of(table)]


def _at(found: Mapping[str, _T], name: str, where: str) -> _T:
    if name not in found:
        raise DataError(f"{where}: there is no class '{name}'.")
    return found[name]


def _number(text: str, where: str, line: str) -> int:
    if not text.isdecimal() or not int(text):
        raise DataError(f"{where}: expected the number of a class, counted from 1, found '{line}'.")
    return int(text)


def _matlab(path: Path, key: str) -> Any:  # noqa: ANN401 — an array of numbers or of records
    """One array of a MATLAB file.

    Raises:
        DataError: The file is missing, damaged or has no such array.
        MissingExtraError: SciPy is not installed.
    """
    scipy = require("scipy.io", extra="clip")
    if not path.is_file():
        raise DataError(f"'{path}' does not exist, and there is no split file that would do instead.")
    try:
        return scipy.loadmat(str(path))[key]
    except Exception as error:  # a damaged file fails in every way there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{path}' cannot be read as a MATLAB file with '{key}': {reason}") from error


def _text(value: Any) -> str:  # noqa: ANN401 — text in arrays in arrays
    return str(value.reshape(-1)[0])
