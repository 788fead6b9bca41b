"""What an adapter file says of itself; no tensor is read, and its backbone need not be there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_modal.files import Header, StoredTensor, read_index


@dataclass(frozen=True)
class AdapterReport:
    """Header and index of an adapter file."""

    path: Path
    file_bytes: int
    header: Header
    tensors: tuple[StoredTensor, ...]

    def group(self, name: str) -> list[StoredTensor]:
        """The tensors of `adapter`, `backbone` or `head`."""
        return [tensor for tensor in self.tensors if tensor.name.startswith(f"{name}.")]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "kind": "adapter",
            "path": str(self.path),
            "file_bytes": self.file_bytes,
            "header": asdict(self.header),
            "tensors": {
                name: [asdict(tensor) for tensor in self.group(name)] for name in ("adapter", "backbone", "head")
            },
        }


def inspect_adapter(path: Path) -> AdapterReport:
    """Read the header and the index of a file.

    Raises:
        FileFormatError: It is missing, corrupt, no adapter file, or from a newer peft_modal.
    """
    tensors, header = read_index(path)
    return AdapterReport(path, path.stat().st_size, header, tuple(tensors))
