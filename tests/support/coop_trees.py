"""Small trees of the few-shot sets as CoOp's instructions lay them out, with pictures that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIDE = 20


def picture(path: Path) -> None:
    """A picture of its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.as_posix()[-40:]))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE + 6, 3), dtype=np.uint8)).save(path)


def class_folders(images: Path, names: Sequence[str], count: int) -> None:
    """`count` pictures `<name>_<i>.jpg` in each folder."""
    for name in names:
        for i in range(count):
            picture(images / name / f"{name}_{i}.jpg")


def caltech(root: Path) -> None:
    class_folders(root / "caltech-101" / "101_ObjectCategories", CALTECH, 10)


def food(root: Path) -> None:
    class_folders(root / "food-101" / "images", ("apple_pie", "ramen"), 10)


def dtd(root: Path) -> None:
    class_folders(root / "dtd" / "images", ("banded", "zigzagged"), 10)


def eurosat(root: Path) -> None:
    class_folders(root / "eurosat" / "2750", EUROSAT, 10)


def pets(root: Path) -> None:
    folder = root / "oxford_pets"
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, name in enumerate(("Abyssinian", "american_bulldog"), start=1):
        for i in range(8):
            picture(folder / "images" / f"{name}_{i}.jpg")
            lines["trainval" if i < 5 else "test"].append(f"{name}_{i} {label} 1 1")
    (folder / "annotations").mkdir()
    for name, found in lines.items():
        (folder / "annotations" / f"{name}.txt").write_text("\n".join(found) + "\n")


def flowers(root: Path) -> None:
    """Labels are not in the order of pictures: 2, 1, 2, 1, ..."""
    folder = root / "oxford_flowers"
    labels = [2, 1] * 10
    for i in range(len(labels)):
        picture(folder / "jpg" / f"image_{i + 1:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    (folder / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "2": "colt's foot"}))


def cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array([["AM General Hummer SUV 2000", "Audi A5 Coupe 2012"]], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    kind = [("class", object), ("fname", object)]
    for part, table, count in (
        ("cars_train", "devkit/cars_train_annos.mat", 10),
        ("cars_test", "cars_test_annos_withlabels.mat", 4),
    ):
        rows = np.zeros((1, count), dtype=kind)
        for i in range(count):
            picture(folder / part / f"{i + 1:05d}.jpg")
            rows[0, i] = (np.array([[i % 2 + 1]], dtype=np.uint8), f"{i + 1:05d}.jpg")
        savemat(folder / table, {"annotations": rows})


def sun397(root: Path) -> None:
    folder = root / "sun397"
    classes = ("/a/abbey", "/c/church/outdoor")
    lists: dict[str, list[str]] = {"Training_01.txt": [], "Testing_01.txt": []}
    for name in classes:
        for i in range(8):
            picture(folder / "SUN397" / name[1:] / f"sun_{i}.jpg")
            lists["Training_01.txt" if i < 5 else "Testing_01.txt"].append(f"{name}/sun_{i}.jpg")
    (folder / "ClassName.txt").write_text("\n".join(classes) + "\n")
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")


def ucf101(root: Path) -> None:
    folder = root / "ucf101"
    lists: dict[str, list[str]] = {"trainlist01.txt": [], "testlist01.txt": []}
    classes = (("ApplyEyeMakeup", "Apply_Eye_Makeup"), ("YoYo", "Yo_Yo"))
    for label, (action, words) in enumerate(classes, start=1):
        for i in range(8):
            name = f"v_{action}_g{i:02d}_c01"
            picture(folder / "UCF-101-midframes" / words / f"{name}.jpg")
            line = f"{action}/{name}.avi"
            if i < 5:
                lists["trainlist01.txt"].append(f"{line} {label}")
            else:
                lists["testlist01.txt"].append(line)
    (folder / "ucfTrainTestlist").mkdir()
    numbered = [f"{label} {action}" for label, (action, _) in enumerate(classes, start=1)]
    for name, lines in {**lists, "classInd.txt": numbered}.items():
        (folder / "ucfTrainTestlist" / name).write_text("\n".join(lines) + "\n")


def aircraft(root: Path) -> None:
    """The order of variants is neither that of the alphabet nor that of the lists."""
    folder = root / "fgvc_aircraft"
    variants = ("DC-10", "A300B4", "Boeing 717")
    number = 0
    for part in ("train", "val", "test"):
        lines = []
        for variant in reversed(variants):
            for _ in range(3):
                picture(folder / "images" / f"{number:07d}.jpg")
                lines.append(f"{number:07d} {variant}")
                number += 1
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")


def imagenet(root: Path) -> None:
    for part, count in (("train", 5), ("val", 2)):
        class_folders(root / "imagenet" / "images" / part, tuple(SYNSETS), count)
    write_class_names(root / "imagenet")


def imagenet_v2(root: Path) -> None:
    """Folders 0 to 2, which sort as numbers only."""
    class_folders(root / "imagenetv2" / "imagenetv2-matched-frequency-format-val", ("0", "1", "2"), 2)
    write_class_names(root / "imagenetv2")


def imagenet_sketch(root: Path) -> None:
    class_folders(root / "imagenet-sketch" / "images", tuple(SYNSETS), 2)
    write_class_names(root / "imagenet-sketch")


def imagenet_a(root: Path) -> None:
    folder = root / "imagenet-adversarial"
    class_folders(folder / "imagenet-a", tuple(SYNSETS)[1:], 2)
    (folder / "imagenet-a" / "README.txt").write_text("not a class")
    write_class_names(folder)


def imagenet_r(root: Path) -> None:
    folder = root / "imagenet-rendition"
    class_folders(folder / "imagenet-r", tuple(SYNSETS)[:2], 2)
    write_class_names(folder)


def write_class_names(folder: Path) -> None:
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in SYNSETS.items()))


CALTECH = ("BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "accordion", "airplanes")
EUROSAT = ("AnnualCrop", "Forest", "SeaLake")
SYNSETS = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
TREES: Mapping[str, Callable[[Path], None]] = {
    "imagenet": imagenet, "caltech101": caltech, "oxford_pets": pets, "stanford_cars": cars, "oxford_flowers": flowers,
    "food101": food, "fgvc_aircraft": aircraft, "sun397": sun397, "dtd": dtd, "eurosat": eurosat, "ucf101": ucf101,
    "imagenet_v2": imagenet_v2, "imagenet_sketch": imagenet_sketch, "imagenet_a": imagenet_a, "imagenet_r": imagenet_r,
}  # fmt: skip
"""What writes each set below a folder."""
