"""Modules whose tensors lie in an adapter file in another form than in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from peft_modal.errors import FileFormatError


class PacksItself(nn.Module):
    """Base of a module that is packed for an adapter file; checkpoints of an unfinished run hold it as it is.

    It holds its own tensors and no submodules.
    """

    file_names: ClassVar[tuple[str, ...]]
    """Names of its tensors in a file."""

    @abstractmethod
    def packed(self) -> dict[str, Tensor]:
        """Its tensors as a file holds them, by `file_names`."""

    def counts(self) -> tuple[int, int]:
        """Trained parameters that a file holds, in whatever form, and those that only training has."""
        return sum(p.numel() for p in self.parameters()), 0

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `packed` gave."""

    @abstractmethod
    def refuse(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Check tensors of a file before they are taken over.

        Args:
            name: Of the module, for sentences.
            tensors: By `file_names`.

        Raises:
            FileFormatError: They are not what `packed` could have given.
        """


def packing_modules(module: nn.Module) -> Iterator[tuple[str, PacksItself]]:
    """Those below a module, with their dotted names.

    Yields:
        Name and module.
    """
    for name, part in module.named_modules():
        if isinstance(part, PacksItself):
            yield name, part


def file_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict with what packs itself packed."""
    packs = dict(packing_modules(module))
    state = {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[0] not in packs}
    for name, part in packs.items():
        state.update({_joined(name, key): tensor for key, tensor in part.packed().items()})
    return state


def load_file_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a module with what `file_state` gave; names and plain shapes have been checked.

    Raises:
        FileFormatError: What is packed does not fit.
    """
    packs = dict(packing_modules(module))
    given = {name: {key: state[_joined(name, key)] for key in part.file_names} for name, part in packs.items()}
    for name, part in packs.items():
        part.refuse(name, given[name])
    plain = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in packs}
    rest = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    missing = [name for name in module.state_dict() if name not in plain and name.rpartition(".")[0] not in packs]
    if missing or not set(plain) <= rest:
        raise FileFormatError(f"tensors are missing or unknown: {sorted({*missing, *(set(plain) - rest)})[:3]}")
    module.load_state_dict(plain, strict=False)
    for name, part in packs.items():
        part.unpack(given[name])


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
