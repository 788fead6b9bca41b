"""Where the weights of an AST come from: shipped, the hub, transformers' folders, the authors' files, an ImageNet DeiT.

Whatever they are called there, they get timm's names; positions are adapted to the network's grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from peft_modal.errors import ConfigError, WeightsError
from peft_modal.files import is_own, read_tensors
from peft_modal.weights import fill_network, load_network
from peft_modal_audio.positions import Grid, adapted
from peft_modal_audio.sizes import CONFIG_FILE, MODELS, NANO, AstSizes, sizes_of_config, sizes_of_file
from peft_modal_vision.weights import read_checkpoint

RANDOM: Final = "random"
_NANO: Final = "nano"
_FILES: Final = ("model.safetensors", "pytorch_model.bin")
_HEADS: Final = ("mlp_head.", "head.", "head_dist.", "classifier.")
_IMAGENET_GRID: Final = (24, 24)
"""Of DeiT-base-384, from which AST's own training started."""
_RENAMED: Final = tuple(
    (re.compile(old), new)
    for old, new in (
        # The authors', saved from DataParallel.
        (r"^module\.", ""),
        (r"^v\.", ""),
        # transformers', versions 4 and 5.
        (r"^audio_spectrogram_transformer\.", ""),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^(?:encoder\.layer|layers)\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:attention\.)?(?:(query|key|value)|([qkv])_proj)\.", r".attn.\1\2."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"^layernorm\.", "norm."),
    )
)
_PARTS: Final = (("query", "key", "value"), ("q", "k", "v"))


def describe(weights: str, model: str | None) -> AstSizes:
    """Sizes of what the backbone's arguments name; weights are not read.

    Raises:
        ConfigError: The model is unknown, or the weights bring sizes of their own.
        WeightsError: A configuration cannot be read or fetched.
    """
    if model is not None and model not in MODELS:
        raise ConfigError(f"backbone.model: '{model}' is unknown, expected {', '.join(MODELS)} or custom")
    if weights == _NANO:
        if model not in {None, _NANO}:
            raise ConfigError(
                f"backbone.weights: 'nano' is of model 'nano', not of '{model}'; set backbone.weights to random, a "
                "file, a folder or a name of the hub"
            )
        return NANO
    if weights == RANDOM:
        return MODELS[model or _NANO]
    path = Path(weights).expanduser()
    if path.is_dir():
        return sizes_of_config(path / CONFIG_FILE, weights)
    if path.is_file() or not _is_hub_name(weights):
        return sizes_of_file(path) if model is None else MODELS[model]
    return sizes_of_config(_from_hub(weights, CONFIG_FILE), weights)


def load(network: nn.Module, sizes: AstSizes, source: AstSizes, weights: str) -> None:
    """Fill a network.

    Args:
        network: Without a classifier.
        sizes: Its sizes.
        source: Sizes of the weights, which differ from its own in frames and mel bins at most.
        weights: As the backbone's argument.

    Raises:
        WeightsError: They are missing, unreadable, cannot be fetched, or are of another architecture.
    """
    if weights == RANDOM:
        return
    if weights == _NANO:
        with resources.as_file(resources.files("peft_modal_audio") / "nano.safetensors") as path:
            if not path.is_file():
                raise WeightsError("the nano weights are missing from this installation; install peft-modal again")
            load_network(network, path)
        return
    path = _find(weights)
    state = read_tensors(path)[0] if is_own(path) else timm_names(read_checkpoint(path))
    fill_network(network, _fitted(state, sizes, source, path), weights)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published file under the network's names, without classifiers."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = name
        for old, new in _RENAMED:
            renamed = old.sub(new, renamed)
        if not renamed.startswith(_HEADS):
            found[renamed] = tensor
    for name in [name for name in found if re.search(r"\.attn\.(query|q)\.", name)]:
        parts = next(parts for parts in _PARTS if f".{parts[0]}." in name)
        names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if all(part in found for part in names):
            fused = torch.cat([found.pop(part) for part in names])
            found[name.replace(f".{parts[0]}.", ".qkv.")] = fused
    return found


def with_one_channel(weight: Tensor) -> Tensor:
    """A patch projection of pictures (D, 3, P, P) for spectrograms, (D, 1, P, P): one channel stands for all three."""
    return weight.sum(1, keepdim=True)


def _fitted(state: Mapping[str, Tensor], sizes: AstSizes, source: AstSizes, path: Path) -> dict[str, Tensor]:
    """With one input channel, and positions of the network's grid.

    Raises:
        WeightsError: There are not as many positions as the grid that the file is said to be of has patches.
    """
    fitted = dict(state)
    grid = source.grid()
    weight = fitted.get("patch_embed.proj.weight")
    if weight is not None and weight.dim() == 4 and weight.shape[1] == 3:
        fitted["patch_embed.proj.weight"] = with_one_channel(weight)
        grid = _IMAGENET_GRID
    positions = fitted.get("pos_embed")
    if positions is None or positions.dim() != 3:
        return fitted
    _check_positions(positions, grid, source, path)
    fitted["pos_embed"] = adapted(positions, grid, sizes.grid())
    return fitted


def _check_positions(positions: Tensor, grid: Grid, source: AstSizes, path: Path) -> None:
    """Refuse positions that are not of a grid.

    Raises:
        WeightsError: They are not.
    """
    expected = 2 + grid[0] * grid[1]
    if positions.shape[1] != expected:
        raise WeightsError(
            f"backbone.weights: '{path}' has {positions.shape[1]} positions, and spectrograms of {source.frames} "
            f"frames and {source.mels} mel bins at strides of {source.stride_time} and {source.stride_frequency} have "
            f"{expected} tokens; give its frames, mels and strides in backbone.sizes, with backbone.model=custom"
        )


def _find(weights: str) -> Path:
    """The file that holds the weights, fetched if need be.

    Raises:
        WeightsError: There is none.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            raise WeightsError(f"backbone.weights: '{weights}' has none of the files {', '.join(_FILES)}")
        return found
    if not _is_hub_name(weights):
        raise WeightsError(
            f"backbone.weights: '{weights}' is neither 'nano' nor 'random' nor an existing file or folder nor a name "
            "of the hub, 'OWNER/NAME'"
        )
    try:
        return _from_hub(weights, _FILES[0])
    except WeightsError:
        return _from_hub(weights, _FILES[1])


def _is_hub_name(weights: str) -> bool:
    return weights.count("/") == 1 and not weights.startswith((".", "/", "~"))


def _from_hub(weights: str, name: str) -> Path:
    """A file of a repository on the hub.

    Raises:
        WeightsError: It cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(weights, name))
    except Exception as error:  # whatever the hub's client lets out
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise WeightsError(f"backbone.weights: '{name}' of '{weights}' cannot be fetched: {reason}") from error
