"""Sizes of an Audio Spectrogram Transformer, and how published files say them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from peft_modal.errors import ConfigError, WeightsError, nearest
from peft_modal_audio.positions import Grid

CONFIG_FILE: Final = "config.json"
_MODEL_TYPE: Final = "audio-spectrogram-transformer"
_STRIDES: Final = re.compile(r"_(\d{1,2})_(\d{1,2})_0\.\d+")
"""In the names of the authors' files: strides in frequency and time, then the score."""


@dataclass(frozen=True)
class AstSizes:
    """The defaults are those of the published networks for AudioSet, of 86 M parameters."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    patch: int = 16
    """Side of a patch, in mel bins and in frames."""
    stride_frequency: int = 10
    """From patch to patch, in mel bins."""
    stride_time: int = 10
    """From patch to patch, in frames."""
    mels: int = 128
    frames: int = 1024
    """Of the spectrograms that the positions are for; others are taken as well, see `positions.adapted`."""
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    weight_init: str = ""
    """timm's name of how random weights are drawn."""

    def grid(self, mels: int | None = None, frames: int | None = None) -> Grid:
        """Patches along frequency and time of a spectrogram; without arguments of the one it is made for.

        Raises:
            ConfigError: The spectrogram is smaller than a patch.
        """
        mels, frames = self.mels if mels is None else mels, self.frames if frames is None else frames
        if min(mels, frames) < self.patch:
            raise ConfigError(
                f"a spectrogram of {frames} frames and {mels} mel bins is smaller than a patch of {self.patch} x "
                f"{self.patch}; take longer clips (data.seconds) or more mel bins (data.mels)"
            )
        return (mels - self.patch) // self.stride_frequency + 1, (frames - self.patch) // self.stride_time + 1

    @property
    def tokens(self) -> int:
        """Patches and the two tokens in front of them."""
        frequency, time = self.grid()
        return 2 + frequency * time


# At this width timm's usual deviation of 0.02 leaves the blocks so small that training takes long to begin.
NANO: Final = AstSizes(
    width=128, depth=6, heads=4, mlp_width=256, frames=128, stride_frequency=16, weight_init="jax"
)  # fmt: skip
"""The shipped network, 0.8 M parameters."""
BASE: Final = AstSizes()
MODELS: Final[Mapping[str, AstSizes]] = {"nano": NANO, "base": BASE}


def given_sizes(given: Mapping[str, Any]) -> AstSizes:
    """Sizes of a network of one's own.

    Raises:
        ConfigError: A size is unknown, or they do not fit each other.
    """
    known = [field.name for field in fields(AstSizes)]
    problems = [f"backbone.sizes: there is no '{name}'; {nearest(name, known)}" for name in given if name not in known]
    if problems:
        raise ConfigError(*problems)
    sizes = AstSizes(**given)
    if sizes.width % sizes.heads:
        raise ConfigError(f"backbone.sizes: width {sizes.width} is no multiple of heads {sizes.heads}")
    return sizes


def sizes_of_file(path: Path) -> AstSizes:
    """Of one of the authors' files, whose names tell strides and, by the data set, length.

    Others than these hold the network for AudioSet.
    """
    found = _STRIDES.search(path.name)
    sizes = BASE if found is None else replace(BASE, stride_frequency=int(found[1]), stride_time=int(found[2]))
    return replace(sizes, frames=128) if path.name.startswith("speechcommands") else sizes


def sizes_of_config(path: Path, source: str) -> AstSizes:
    """Of a `config.json` that transformers wrote.

    Args:
        path: The file.
        source: What it belongs to, for error messages.

    Raises:
        WeightsError: It is missing, unreadable, or of another kind of network.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"backbone.weights: '{source}' has no readable {CONFIG_FILE}, as transformers writes it"
        ) from error
    if kind != _MODEL_TYPE:
        raise WeightsError(f"backbone.weights: '{source}' is of the kind '{kind}', expected '{_MODEL_TYPE}'")
    width = config.get("hidden_size", BASE.width)
    if config.get("hidden_act", "gelu") != "gelu":
        raise WeightsError(f"backbone.weights: '{source}' computes '{config['hidden_act']}', expected 'gelu'")
    return AstSizes(
        width=width,
        depth=config.get("num_hidden_layers", BASE.depth),
        heads=config.get("num_attention_heads", BASE.heads),
        mlp_width=config.get("intermediate_size", 4 * width),
        patch=config.get("patch_size", BASE.patch),
        stride_frequency=config.get("frequency_stride", BASE.stride_frequency),
        stride_time=config.get("time_stride", BASE.stride_time),
        mels=config.get("num_mel_bins", BASE.mels),
        frames=config.get("max_length", BASE.frames),
        qkv_bias=config.get("qkv_bias", True),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )
