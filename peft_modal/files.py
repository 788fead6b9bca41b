"""Adapter files: one safetensors file with everything that training made, and a JSON document that describes it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_modal._version import __version__
from peft_modal.errors import FileFormatError

FORMAT_VERSION: Final = 1
_KEY: Final = "peft_modal"
_TYPES: Final[dict[str, type]] = {
    "config": dict, "fingerprint": str, "class_names": list, "preprocessing": dict, "metrics": dict, "versions": dict,
}  # fmt: skip
"""Of the header's fields, as JSON holds them."""


@dataclass(frozen=True)
class Header:
    """What an adapter file says of itself."""

    config: dict[str, Any]
    """The complete configuration, head and data included."""
    fingerprint: str
    """Fingerprint of the backbone's weights that the adapter was trained on."""
    class_names: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """What a predictor has to do to its inputs again."""
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash over sorted (name, shape, dtype, bytes) of a network's tensors.

    Args:
        state: The network's own state dict; what stands in for its tensors is not in it.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a file means."""
    import importlib.metadata
    import platform

    names = ("torch", "lightning", "safetensors", "numpy")
    return {
        "peft_modal": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write a safetensors file with one JSON document, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(plain, temporary, metadata={_KEY: json.dumps(document)})
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON document of a file that `write_tensors` wrote.

    Raises:
        FileFormatError: The file is missing, corrupt, or not one of ours.
    """
    if not path.is_file():
        raise FileFormatError(f"'{path}' does not exist or is no file; a run leaves its adapter as adapter.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a mapping
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"'{path}' is no readable safetensors file ({error}); copy or train it again") from error
    if _KEY not in metadata:
        raise FileFormatError(f"'{path}' is a safetensors file, but not one that peft_modal wrote")
    try:
        document = json.loads(metadata[_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"the header of '{path}' is damaged ({error}); copy or train it again") from error
    if not isinstance(document, dict):
        raise FileFormatError(f"the header of '{path}' is damaged: it is no mapping; copy or train it again")
    return tensors, document


def save_adapter(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write an adapter file.

    Args:
        path: Where.
        tensors: `adapter.*`, `backbone.*` and `head.*`.
        header: Its description.
    """
    write_tensors(path, tensors, {"kind": "adapter", **asdict(header)})


def load_adapter(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Read an adapter file.

    Raises:
        FileFormatError: It is corrupt, no adapter file, or from a newer peft_modal.
    """
    tensors, document = read_tensors(path)
    if document.pop("kind", None) != "adapter":
        raise FileFormatError(f"'{path}' holds backbone weights, not an adapter")
    version = document.get("format_version")
    if type(version) is not int or version < 1:
        raise FileFormatError(
            f"the header of '{path}' is damaged: its format version is {version!r}; copy or train it again"
        )
    if version > FORMAT_VERSION:
        made_by = document.get("versions")
        known = made_by.get("peft_modal") if isinstance(made_by, dict) else None
        raise FileFormatError(
            f"'{path}' has format version {version}, this peft_modal ({__version__}) reads up to {FORMAT_VERSION}; "
            f"install {f'peft-modal>={known}' if known else 'a newer peft-modal'}"
        )
    unknown = sorted(set(document) - {f.name for f in Header.__dataclass_fields__.values()})
    missing = sorted({"config", "fingerprint"} - set(document))
    if unknown or missing:
        raise FileFormatError(
            f"the header of '{path}' does not fit its format version {version}: "
            f"missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )
    damaged = [name for name, kind in _TYPES.items() if not isinstance(document.get(name, kind()), kind)]
    if not damaged and not all(isinstance(name, str) for name in document.get("class_names", ())):
        damaged = ["class_names"]
    if damaged:
        raise FileFormatError(
            f"the header of '{path}' is damaged: {', '.join(damaged)} cannot be read; copy or train it again"
        )
    document["class_names"] = tuple(document.get("class_names", ()))
    return tensors, Header(**document)
