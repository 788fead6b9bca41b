"""A diffusers pipeline as files: what it is made of, and how its parts are opened. Reads JSON and safetensors only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from peft_modal.errors import WeightsError, nearest
from peft_modal_diffusion.families import FAMILIES, HUB_NAMES, SIZES, Family

NANO = "nano"


@dataclass(frozen=True)
class Layout:
    """Which parts a pipeline has and where they lie."""

    family: Family
    source: str
    """Folder or hub name; empty where only sizes are known."""
    configs: Mapping[str, Mapping[str, Any]]
    """Configuration of the denoiser and of each CLIP text encoder, by component."""


def nano_folder() -> Path:
    """The shipped pipeline.

    Raises:
        WeightsError: This installation lacks it.
    """
    folder = Path(str(resources.files("peft_modal_diffusion"))) / NANO
    if not (folder / "model_index.json").is_file():
        raise WeightsError("the nano pipeline is missing from this installation; install peft-modal again")
    return folder


def read_layout(weights: str) -> Layout:
    """The layout of the shipped pipeline, of a folder, or of a pipeline on the hub.

    A hub name of a published size is known without a network.

    Raises:
        WeightsError: There is no such pipeline, or it is of a family that is not supported.
    """
    if weights == NANO:
        return _of_folder(nano_folder())
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return _of_folder(folder)
    if weights in HUB_NAMES:
        return layout_of_size(HUB_NAMES[weights], source=weights)
    if folder.suffix in {".safetensors", ".ckpt"}:
        raise WeightsError(
            f"backbone.weights: '{weights}' is a single file; give a diffusers pipeline folder (diffusers makes one: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER))"
        )
    if weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise WeightsError(
            f"backbone.weights: '{weights}' is neither 'nano' nor 'random' nor an existing folder nor a hub name "
            "'owner/name'"
        )
    return _of_hub(weights)


def layout_of_size(name: str, *, source: str = "") -> Layout:
    """The layout of a published size, or of a toy.

    Raises:
        WeightsError: The size is unknown.
    """
    if name not in SIZES:
        raise WeightsError(f"backbone.architecture: unknown size '{name}'; {nearest(name, SIZES)}")
    size = SIZES[name]
    family = FAMILIES[size.pipeline]
    texts = dict(zip(family.text_encoders, size.text_encoders, strict=True))
    return Layout(family, source, {family.denoiser: size.denoiser, **texts})


def _of_folder(folder: Path) -> Layout:
    index = _read_json(folder / "model_index.json", folder)
    family = _family(index, str(folder))
    names = (family.denoiser, *family.text_encoders)
    return Layout(
        family, str(folder), {name: _read_json(folder / name / "config.json", folder) for name in names}
    )  # fmt: skip


def _of_hub(name: str) -> Layout:
    from huggingface_hub import hf_hub_download

    def fetch(file: str) -> Mapping[str, Any]:
        with opened(name, file):
            return _read_json(Path(hf_hub_download(name, file)), Path(name))

    family = _family(fetch("model_index.json"), name)
    names = (family.denoiser, *family.text_encoders)
    return Layout(family, name, {part: fetch(f"{part}/config.json") for part in names})


def _family(index: Mapping[str, Any], where: str) -> Family:
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise WeightsError(f"'{where}' is a {name}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _read_json(file: Path, folder: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise WeightsError(f"'{folder}' is no diffusers pipeline folder: it has no {file.name} in '{file.parent}'")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"'{file}' cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"'{file}' is no JSON object")
    return found


def open_part(layout: Layout, component: str, class_name: str, *, library: str = "diffusers") -> Any:  # noqa: ANN401
    """A component with its weights, in float32.

    Raises:
        WeightsError: It is missing, corrupt, or of another architecture.
    """
    import importlib

    cls = getattr(importlib.import_module(library), class_name)
    options: dict[str, Any] = {"subfolder": component}
    if hasattr(cls, "load_state_dict"):
        options |= {"use_safetensors": True}
        options["torch_dtype" if library == "diffusers" else "dtype"] = torch.float32
    with opened(layout.source, component):
        return cls.from_pretrained(layout.source, **options)


@contextmanager
def opened(source: str, component: str) -> Iterator[None]:
    """Turn what the libraries raise into one sentence.

    Raises:
        WeightsError: Always in place of what was raised.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"backbone.weights: '{component}' of '{source}' cannot be opened: {first}") from error
