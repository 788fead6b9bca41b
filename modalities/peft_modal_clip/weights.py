"""Where the weights of a CLIP come from: this package, a file, a folder, a name of open_clip, or the hub."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from peft_modal.errors import ConfigError, WeightsError, nearest
from peft_modal.extras import require
from peft_modal.files import is_own
from peft_modal.weights import fill_network, load_network
from peft_modal_clip.sizes import CONFIG_FILE, ClipModel, ClipSizes, model_by_name, model_of_file

HUB: Final = "hf-hub:"
FOLDER: Final = "local-dir:"
_CHECKPOINTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors")
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's files hold beside weights."""


def describe(weights: str, model: str | None) -> ClipModel:
    """Sizes and tokenizer of what the backbone's arguments name; weights are not read.

    Raises:
        ConfigError: The model is unknown or of another kind, or both arguments say what the sizes are.
        WeightsError: A configuration cannot be read or fetched.
    """
    says_sizes = weights.startswith(HUB) or Path(weights).expanduser().is_dir()
    if model is not None and (says_sizes or weights == "nano"):
        raise ConfigError(f"backbone.model: weights '{weights}' bring their own sizes; leave the model out.")
    if model is not None:
        return _as_trained(model_by_name(model), model, weights)
    if weights.startswith(HUB):
        return model_of_file(_from_hub(weights, CONFIG_FILE), weights)
    if says_sizes:
        return model_of_file(Path(weights).expanduser() / CONFIG_FILE, weights)
    return ClipModel(ClipSizes())


def tokenizer_of(weights: str, model: ClipModel) -> str:
    """Name of the tokenizer that belongs to weights, for `backbone.tokenizer`."""
    if model.names_tokenizer:
        return weights if weights.startswith(HUB) else f"{FOLDER}{Path(weights).expanduser().resolve()}"
    return "nano" if model.sizes.vocab_size == ClipSizes().vocab_size else "clip"


def load(network: nn.Module, weights: str, model: str | None) -> None:
    """Fill a network.

    Args:
        network: The CLIP.
        weights: As the backbone's argument.
        model: As the backbone's argument.

    Raises:
        WeightsError: The weights are missing, unreadable, or of another architecture.
    """
    if weights == "random":
        return
    if weights == "nano":
        with resources.as_file(resources.files("peft_modal_clip") / "nano.safetensors") as path:
            if not path.is_file():
                raise WeightsError("the nano weights are missing from this installation; install peft-modal again")
            load_network(network, path)
        return
    path = _find(weights, model)
    if is_own(path):
        load_network(network, path)
    else:
        fill_network(network, _foreign(path, network), weights)


def _as_trained(described: ClipModel, model: str, weights: str) -> ClipModel:
    """With the activation that named weights were trained with, which some names of models do not say."""
    pretrained = require("open_clip.pretrained", extra="clip")
    if not pretrained.is_pretrained_cfg(model, weights):
        return described
    quick_gelu = bool(pretrained.get_pretrained_cfg(model, weights).get("quick_gelu", False))
    return replace(described, sizes=replace(described.sizes, quick_gelu=quick_gelu))


def _find(weights: str, model: str | None) -> Path:
    """The file that holds the weights, fetched if need be.

    Raises:
        WeightsError: There is none.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        found = next((path / name for name in _CHECKPOINTS if (path / name).is_file()), None)
        if found is None:
            raise WeightsError(f"backbone.weights: '{weights}' has none of the files {', '.join(_CHECKPOINTS)}")
        return found
    if path.is_file():
        return path
    if weights.startswith(HUB):
        return _from_hub(weights, None)
    if model is None:
        raise WeightsError(
            f"backbone.weights: '{weights}' is neither 'nano' nor 'random' nor an existing file or folder; with "
            f"backbone.model=NAME it may be one of open_clip's names, and '{HUB}OWNER/NAME' is fetched from the hub"
        )
    pretrained = require("open_clip.pretrained", extra="clip")
    known = pretrained.list_pretrained_tags_by_model(model)
    if not pretrained.is_pretrained_cfg(model, weights):
        raise WeightsError(
            f"backbone.weights: '{weights}' is no existing file, and open_clip has no such weights of '{model}'; "
            f"{nearest(weights, known)}"
        )
    try:
        return Path(pretrained.download_pretrained(pretrained.get_pretrained_cfg(model, weights)))
    except Exception as error:  # whatever the hub's client and urllib let out
        raise WeightsError(f"backbone.weights: '{weights}' of '{model}' cannot be fetched: {error}") from error


def _from_hub(weights: str, name: str | None) -> Path:
    """A file of a repository on the hub; without a name the one with the weights.

    Raises:
        WeightsError: It cannot be fetched.
    """
    pretrained = require("open_clip.pretrained", extra="clip")
    try:
        return Path(pretrained.download_pretrained_from_hf(weights.removeprefix(HUB), filename=name))
    except Exception as error:  # whatever the hub's client lets out
        raise WeightsError(f"backbone.weights: '{weights}' cannot be fetched: {error}") from error


def _foreign(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Tensors of a checkpoint that open_clip or OpenAI published, under the network's names.

    Raises:
        WeightsError: It cannot be read.
    """
    factory = require("open_clip.factory", extra="clip")
    try:
        state: dict[str, Any] = factory.load_state_dict(str(path), weights_only=True)
        own = network.state_dict()
        # Some files have the temperature as a vector of one.
        return {
            name: tensor.reshape(own[name].shape) if name == "logit_scale" else tensor
            for name, tensor in state.items()
            if name not in _NO_WEIGHTS
        }
    except Exception as error:  # a damaged file may fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"backbone.weights: '{path}' cannot be read as weights of a CLIP: {reason}") from error
