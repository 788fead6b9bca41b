"""A diffusers pipeline as files: what it is made of, and how its parts are opened. Reads JSON and safetensors only."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from peft_modal.errors import PeftModalError, WeightsError, nearest
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
    has_t5: bool = False
    """Whether the family's T5 encoder is among the files."""
    zeroes_empty: bool = False
    """Whether no caption is a state of zeros, and not what the text encoders make of an empty one."""


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
    configs = {family.denoiser: size.denoiser, **texts}
    return Layout(
        family, source, configs, has_t5=bool(source) and family.t5 is not None, zeroes_empty=family.name == "sdxl"
    )  # fmt: skip


def _of_folder(folder: Path) -> Layout:
    return _of_index(str(folder), lambda file: _read_json(folder / file, folder))


def _of_hub(name: str) -> Layout:
    from huggingface_hub import hf_hub_download

    def fetch(file: str) -> Mapping[str, Any]:
        with opened(name, file):
            path = Path(hf_hub_download(name, file))
        return _read_json(path, Path(name))

    return _of_index(name, fetch)


def _of_index(source: str, read: Callable[[str], Mapping[str, Any]]) -> Layout:
    index = read("model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in FAMILIES:
        raise WeightsError(f"'{source}' is a {pipeline}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[pipeline]
    parts = (family.denoiser, *family.text_encoders)
    # diffusers lists a part that is left out as [null, null].
    has_t5 = family.t5 is not None and bool((index.get(family.t5) or [None])[0])
    # In diffusers an argument of SDXL's pipeline, on unless the index says otherwise.
    zeroes_empty = family.name == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True))
    configs = {part: read(f"{part}/config.json") for part in parts}
    return Layout(family, source, configs, has_t5=has_t5, zeroes_empty=zeroes_empty)


def _read_json(file: Path, folder: Path) -> Mapping[str, Any]:
    if not file.is_file():
        name = file.relative_to(folder) if file.is_relative_to(folder) else file.name
        raise WeightsError(f"'{folder}' is no diffusers pipeline folder: it has no {name}")
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
    if hasattr(cls, "load_state_dict"):
        return open_model(cls, layout.source, component, library=library)
    with opened(layout.source, component):
        return cls.from_pretrained(layout.source, subfolder=component)


def open_model(cls: Any, source: str, component: str = "", *, library: str = "diffusers") -> Any:  # noqa: ANN401
    """A network from `component` of `source` with its weights, in float32.

    Raises:
        WeightsError: It is missing, corrupt, incomplete, or of another architecture.
    """
    options: dict[str, Any] = {"torch_dtype" if library == "diffusers" else "dtype": torch.float32}
    files = [file.name for file in (Path(source) / component).glob("*.safetensors")]
    # Many folders hold half precision only, under a name of its own.
    if files and all(".fp16" in file for file in files):
        options["variant"] = "fp16"
    with opened(source, component or cls.__name__):
        model, found = cls.from_pretrained(
            source, subfolder=component, use_safetensors=True, output_loading_info=True, **options
        )
    # The libraries fill what is missing with random numbers.
    if found["missing_keys"]:
        first, *others = sorted(found["missing_keys"])
        more = f", nor {len(others)} other tensors" if others else ""
        raise WeightsError(f"{_cannot(source, component or cls.__name__)}: it has no '{first}'{more}")
    return model


def open_pipeline(layout: Layout, *, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:  # noqa: ANN401
    """The pipeline as diffusers itself opens it.

    Args:
        layout: Where it lies.
        dtype: Type of its weights.
        parts: Components that stand in for its own; None leaves one out.

    Raises:
        WeightsError: The denoiser has nothing around it, or a component is missing or corrupt.
    """
    import diffusers

    if not layout.source:
        raise WeightsError("a denoiser of a size for measuring has no pipeline around it; choose other weights")
    cls = getattr(diffusers, layout.family.pipeline)
    with opened(layout.source, layout.family.pipeline):
        index = cls.load_config(layout.source)
        t5 = layout.family.t5
        optional = (t5, t5.replace("text_encoder", "tokenizer")) if t5 else ()
        # What such a pipeline lacks has to be said, or it is missed.
        absent = {name: None for name in optional if not any(index.get(name) or ())}
        return cls.from_pretrained(layout.source, dtype=dtype, use_safetensors=True, **{**absent, **parts})


@contextmanager
def opened(source: str, component: str) -> Iterator[None]:
    """Turn what the libraries raise into one sentence.

    Raises:
        WeightsError: Always in place of what was raised.
    """
    is_local = Path(source).expanduser().is_dir()  # downloads show how far they are
    with (
        in_one_sentence(_cannot(source, component), WeightsError),
        quiet() if is_local else nullcontext(),
    ):
        yield


def _cannot(source: str, component: str) -> str:
    return f"backbone.weights: '{component}' of '{source}' cannot be opened"


@contextmanager
def in_one_sentence(sentence: str, kind: type[PeftModalError]) -> Iterator[None]:
    """Put a sentence before the first line of what the libraries raise.

    Raises:
        PeftModalError: `kind`, in place of what was raised.
    """
    from safetensors import SafetensorError

    try:
        yield
    except PeftModalError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise kind(f"{sentence}: {first}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice of the libraries inside."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(
            logging.CRITICAL
        )  # reports of what a file lacks are warnings and errors, and ours to make
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, shows) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if shows:
                library.enable_progress_bar()
