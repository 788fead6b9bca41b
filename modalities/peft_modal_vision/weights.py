"""Where the weights of timm's networks come from: shipped, the hub, files in the authors' layouts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from peft_modal.errors import WeightsError
from peft_modal.files import is_own, read_tensors
from peft_modal.weights import fill_network, load_network

NANO: Final = "nano"
RANDOM: Final = "random"
PRETRAINED: Final = "pretrained"
_HUB: Final = "hf-hub:"
_HEADS: Final = ("head.", "head_dist.", "fc.", "mask_token", "pre_logits.")
"""What a classifier's or a pre-training's file holds beside the network."""


def load(network: nn.Module, model: str, weights: str) -> None:
    """Fill a network of timm's.

    Args:
        network: Without a classifier.
        model: Its name.
        weights: `nano`, `random`, `pretrained` or a tag of timm's for the model, `hf-hub:OWNER/NAME`, or a file.

    Raises:
        WeightsError: They are missing, unreadable, cannot be fetched, or are of another architecture.
    """
    if weights == RANDOM:
        return
    if weights == NANO:
        source = resources.files("peft_modal_vision") / "nano.safetensors"
        with resources.as_file(source) as path:
            if not path.is_file():
                raise WeightsError("the nano weights are missing from this installation; install peft-modal again")
            load_network(network, path)
        return
    path = Path(weights).expanduser()
    if not path.is_file():
        fill_network(network, _fetched(network, model, weights), weights)
    elif is_own(path):
        fill_network(network, resampled(network, read_tensors(path)[0]), weights)
    elif path.suffix == ".npz":
        _load_jax(network, path)
    else:
        state = resampled(network, read_checkpoint(path))
        own = network.state_dict()
        kept = {name: value for name, value in state.items() if name in own or not name.startswith(_HEADS)}
        fill_network(network, kept, weights)


def resampled(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state under timm's names, with positions for the network's picture size.

    Raises:
        WeightsError: timm cannot read it as one of this architecture.
    """
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return dict(state)
    try:
        found: Mapping[str, Tensor] = rename(dict(state), network)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"backbone.weights: the file is not of this architecture: {_line(error)}") from error
    return dict(found)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch file, as timm finds them; no code in it is run.

    Raises:
        WeightsError: It cannot be read.
    """
    from timm.models import load_state_dict

    try:
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"backbone.weights: '{path}' cannot be read as weights (pickles with code are never opened): {_line(error)}"
        ) from error
    return state


def _load_jax(network: Any, path: Path) -> None:  # noqa: ANN401 — one of timm's classes
    """The authors' own `ViT-B_16.npz` and its kind.

    Raises:
        WeightsError: It is of another architecture.
    """
    try:
        network.load_pretrained(str(path))
    except Exception as error:
        raise WeightsError(
            f"backbone.weights: '{path}' is not a checkpoint of this architecture: {_line(error)}"
        ) from error


def _fetched(network: nn.Module, model: str, weights: str) -> dict[str, Tensor]:
    import timm

    name = weights if weights.startswith(_HUB) else model if weights == PRETRAINED else f"{model}.{weights}"
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    try:
        found: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, **sized)
    except Exception as error:
        raise WeightsError(
            f"backbone.weights: '{weights}' is no file, and '{name}' cannot be fetched: {_line(error)}"
        ) from error
    return found.state_dict()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
