"""What training makes, by ownership: the tensors of adapter and head under their names in the adapter file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from peft_modal.attach import Adapter
from peft_modal.attach.packing import file_state, load_file_state
from peft_modal.errors import FileFormatError

_HEAD = "head."


def head_tensors(head: nn.Module, *, training_only: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers of a head under their names in the adapter file; with `training_only` in a checkpoint."""
    state = head.state_dict() if training_only else file_state(head)
    return {_HEAD + name: tensor for name, tensor in state.items()}


def tensors_of(adapter: Adapter, head: nn.Module, *, training_only: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers of adapter and head: `adapter.*`, `backbone.*`, `head.*`.

    Args:
        adapter: The adapter.
        head: The head.
        training_only: With what only training needs, for a checkpoint that goes on.
    """
    return {
        **adapter.state(training_only=training_only),
        **head_tensors(head, training_only=training_only),
    }


def load_tensors(
    adapter: Adapter, head: nn.Module, tensors: Mapping[str, Tensor], *, training_only: bool = False
) -> None:
    """Fill adapter and head strictly with what `tensors_of` with the same `training_only` gave.

    Raises:
        FileFormatError: A tensor is missing, left over, or of another shape.
    """
    own = head.state_dict() if training_only else file_state(head)
    given = {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items() if name.startswith(_HEAD)}
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise FileFormatError(f"the head's tensors do not fit: missing {missing[:3]}, unknown {extra[:3]}")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise FileFormatError(
                f"tensor 'head.{name}' has shape {tuple(tensor.shape)}, this head has {tuple(own[name].shape)}"
            )
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    adapter.load(rest, training_only=training_only)
    if training_only:
        head.load_state_dict(given)
    else:
        load_file_state(head, given)
