"""Adapter files: one safetensors file with everything that training made, and a JSON document that describes it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_modal._version import __version__
from peft_modal.errors import FileFormatError, WriteError

FORMAT_VERSION: Final = 2
_KEY: Final = "peft_modal"
_TYPES: Final[dict[str, type]] = {
    "config": dict, "fingerprint": str, "class_names": list, "preprocessing": dict, "metrics": dict, "versions": dict,
    "facts": dict,
}  # fmt: skip
"""Of the header's fields, as JSON holds them."""
_CHECKSUM: Final = "checksum"
_CHECKSUM_SINCE: Final = 2
"""The format version from which every adapter file carries a checksum."""
_TEMPORARY: Final = ".tmp"


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
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method says of itself beside the configuration; see `Adapter.facts`."""
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace `path` by what a block writes, or leave it as it is: whatever happens, it is whole.

    Yields:
        A temporary file beside `path`, which takes its place when the block ends well.

    Raises:
        WriteError: The disk is full, the place is not writable, and the like.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise WriteError(unwritable(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """Make a folder as a whole: it is there when a block has ended well, and not before.

    Args:
        path: A folder that does not exist, or is empty.

    Yields:
        A temporary folder beside it, which takes its place.

    Raises:
        WriteError: The disk is full, the place is not writable, and the like.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise WriteError(unwritable(path, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def unwritable(path: str | Path, error: Exception) -> str:
    """The sentence for a file that could not be written; `error` is what the operating system said."""
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return (
        f"'{path}' cannot be written: {reason}; make room or name another place and repeat the command, "
        "what was there before is whole"
    )


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`; nobody may be writing there."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write a safetensors file with one JSON document and a checksum over both, atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    read_back = json.loads(json.dumps(document))  # what a reader will see: lists for tuples, text for keys
    signed = {**read_back, _CHECKSUM: _checksum(plain, read_back)}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={_KEY: json.dumps(signed)})


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _checksum(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """Hash over tensors and document; the document's own checksum does not count."""
    text = json.dumps({key: value for key, value in document.items() if key != _CHECKSUM}, sort_keys=True)
    return hashlib.sha256(f"{fingerprint(tensors)}|{text}".encode()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON document of a file that `write_tensors` wrote.

    Raises:
        FileFormatError: The file is missing, corrupt, does not fit its checksum, or is not one of ours.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a mapping
    document = _document_of(path, metadata)
    if _CHECKSUM in document and document[_CHECKSUM] != _checksum(tensors, document):
        raise FileFormatError(f"'{path}' is damaged: its content does not fit its checksum; copy or train it again")
    return tensors, document


def is_own(path: Path) -> bool:
    """Whether a file is one that `write_tensors` wrote; one that is not called `.safetensors` is not opened.

    Raises:
        FileFormatError: It is called so, and is missing or no safetensors file.
    """
    if path.suffix != ".safetensors":
        return False
    with _opened(path) as file:
        return _KEY in (file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:  # safetensors types none of its methods
    if not path.is_file():
        raise FileFormatError(f"'{path}' does not exist or is no file; a run leaves its adapter as adapter.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"'{path}' is no readable safetensors file ({error}); copy or train it again") from error


def _document_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise FileFormatError(f"'{path}' is a safetensors file, but not one that peft_modal wrote")
    try:
        document = json.loads(metadata[_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"the header of '{path}' is damaged ({error}); copy or train it again") from error
    if not isinstance(document, dict):
        raise FileFormatError(f"the header of '{path}' is damaged: it is no mapping; copy or train it again")
    return document


def save_adapter(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write an adapter file.

    Args:
        path: Where.
        tensors: `adapter.*`, `backbone.*` and `head.*`.
        header: Its description.
    """
    write_tensors(path, tensors, {"kind": "adapter", **asdict(header), "format_version": FORMAT_VERSION})


@dataclass(frozen=True)
class StoredTensor:
    """What a file's index says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: `F32`, `BF16`, `I64`."""
    bytes: int


def read_index(path: Path) -> tuple[list[StoredTensor], Header]:
    """Header and list of tensors of an adapter file; no tensor is read.

    Raises:
        FileFormatError: It is corrupt, no adapter file, or from a newer peft_modal.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        stored = []
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
            stored.append(StoredTensor(name, shape, dtype, math.prod(shape) * _bits(dtype) // 8))
    return stored, _header_of(path, _document_of(path, metadata))


def load_adapter(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Read an adapter file of this or an older format version; those of version 1 carry no checksum.

    Raises:
        FileFormatError: It is corrupt, no adapter file, or from a newer peft_modal.
    """
    tensors, document = read_tensors(path)
    return tensors, _header_of(path, document)


def _header_of(path: Path, document: dict[str, Any]) -> Header:
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
    if document.pop(_CHECKSUM, None) is None and version >= _CHECKSUM_SINCE:
        raise FileFormatError(f"the header of '{path}' is damaged: its checksum is missing; copy or train it again")
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
    return Header(**document)


def _bits(dtype: str) -> int:
    """Size of an entry: the number in the name of its type; `BOOL` is a byte."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8
