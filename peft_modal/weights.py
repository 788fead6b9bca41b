"""Backbone weights into a network, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from peft_modal.errors import WeightsError
from peft_modal.files import read_tensors


def load_network(network: nn.Module, path: str | Path) -> None:
    """Fill a network with every tensor of a file: all or, where one does not fit, none.

    Args:
        network: The backbone's network; its tensors keep their type and device.
        path: A file with the network's own tensor names, in any floating-point type.

    Raises:
        WeightsError: There is no such file, or it is of another architecture.
        FileFormatError: It is corrupt, or not one that peft_modal wrote.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise WeightsError(
            f"backbone.weights: '{path}' is neither a name that this backbone knows nor an existing file"
        )
    fill_network(network, read_tensors(file)[0], path)


def fill_network(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Fill a network with every tensor of a state: all or, where one does not fit, none.

    Args:
        network: The backbone's network; its tensors keep their type and device.
        state: Tensors under the network's own names, in any floating-point type.
        path: Where they come from.

    Raises:
        WeightsError: It is of another architecture.
    """
    own = network.state_dict()
    problems = [f"no '{name}'" for name in own if name not in state]
    problems += [f"an unknown '{name}'" for name in state if name not in own]
    problems += [
        f"'{name}' of shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"backbone.weights: '{path}' is of another architecture: it has {', '.join(problems[:3])}{more}"
        )
    network.load_state_dict(state)
