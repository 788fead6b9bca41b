"""The eleven sets that CLIP's tuning is measured on, and four more test sets of ImageNet, as CoOp lays them out.

Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from peft_modal_clip import making
from peft_modal_clip.making import Maker

_PHOTO: Final = "a photo of a {}."


@dataclass(frozen=True)
class PromptedSet:
    """One of the sets."""

    folder: str
    """Below `data.root`."""
    images: tuple[str, ...]
    """What its folder of pictures is called; paths in the split file are relative to it."""
    classes: int
    template: str
    """What the name of a class is put into."""
    make: Maker
    split: str | None = None
    """Its split file; None where the published lists are the split."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Other names of classes."""
    is_test_only: bool = False


SETS: Final[Mapping[str, PromptedSet]] = MappingProxyType(
    {
        "imagenet": PromptedSet("imagenet", ("images", ""), 1000, _PHOTO, making.imagenet),
        "caltech101": PromptedSet(
            "caltech-101", ("101_ObjectCategories",), 100, _PHOTO,
            making.by_class(seed="caltech101", ignored=making.CALTECH_IGNORED, names=making.CALTECH_NAMES),
            "split_zhou_Caltech101.json", making.CALTECH_NAMES,
        ),
        "oxford_pets": PromptedSet(
            "oxford_pets", ("images",), 37, "a photo of a {}, a type of pet.", making.pets,
            "split_zhou_OxfordPets.json",
        ),
        "stanford_cars": PromptedSet(
            "stanford_cars", ("",), 196, _PHOTO, making.cars, "split_zhou_StanfordCars.json",
        ),
        "oxford_flowers": PromptedSet(
            "oxford_flowers", ("jpg",), 102, "a photo of a {}, a type of flower.", making.flowers,
            "split_zhou_OxfordFlowers.json",
        ),
        "food101": PromptedSet(
            "food-101", ("images",), 101, "a photo of {}, a type of food.", making.by_class(seed="food101"),
            "split_zhou_Food101.json",
        ),
        "fgvc_aircraft": PromptedSet(
            "fgvc_aircraft", ("images",), 100, "a photo of a {}, a type of aircraft.", making.aircraft,
        ),
        "sun397": PromptedSet("sun397", ("SUN397",), 397, _PHOTO, making.sun397, "split_zhou_SUN397.json"),
        "dtd": PromptedSet(
            "dtd", ("images",), 47, "{} texture.", making.by_class(seed="dtd"),
            "split_zhou_DescribableTextures.json",
        ),
        "eurosat": PromptedSet(
            "eurosat", ("2750",), 10, "a centered satellite photo of {}.",
            making.by_class(seed="eurosat", names=making.EUROSAT_NAMES), "split_zhou_EuroSAT.json",
            making.EUROSAT_NAMES,
        ),
        "ucf101": PromptedSet(
            "ucf101", ("UCF-101-midframes",), 101, "a photo of a person doing {}.", making.ucf101,
            "split_zhou_UCF101.json",
        ),
        "imagenet_v2": PromptedSet(
            "imagenetv2", ("imagenetv2-matched-frequency-format-val",), 1000, _PHOTO, making.imagenet_v2,
            is_test_only=True,
        ),
        "imagenet_sketch": PromptedSet(
            "imagenet-sketch", ("images",), 1000, _PHOTO, making.imagenet_variant, is_test_only=True,
        ),
        "imagenet_a": PromptedSet(
            "imagenet-adversarial", ("imagenet-a",), 200, _PHOTO, making.imagenet_variant, is_test_only=True,
        ),
        "imagenet_r": PromptedSet(
            "imagenet-rendition", ("imagenet-r",), 200, _PHOTO, making.imagenet_variant, is_test_only=True,
        ),
    }
)  # fmt: skip
"""By the names that CoOp's code gives them."""
