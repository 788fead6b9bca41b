"""Sizes of a CLIP, and how open_clip's configurations say them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from peft_modal.errors import ConfigError, WeightsError, nearest
from peft_modal.extras import require

CONFIG_FILE: Final = "open_clip_config.json"

_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_VISION = {"layers", "width", "head_width", "patch_size", "image_size", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
_STAGES = 4
_STRIDE = 32
"""Pixels to a side of what a ResNet's last stage gives."""
_WIDENING = 32
"""Width of that over the stem's."""
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}


@dataclass(frozen=True)
class ClipSizes:
    """A vision transformer or ResNet and a text transformer of open_clip; the defaults are the nano's."""

    embed_dim: int = 128
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int | tuple[int, ...] = 3
    """Blocks of a transformer, or of the four stages of a ResNet."""
    vision_heads: int = 4
    vision_mlp_ratio: float = 4.0
    context_length: int = 20
    vocab_size: int = 686
    text_width: int = 96
    text_layers: int = 3
    text_heads: int = 4
    quick_gelu: bool = False

    @property
    def is_resnet(self) -> bool:
        """Whether pictures are read by a ResNet; it halves their side five times, and pools with attention."""
        return not isinstance(self.vision_layers, int)

    def with_given(self, given: Mapping[str, Any]) -> ClipSizes:
        """A copy in which what is given, and not None, replaces the rest.

        Raises:
            ConfigError: A width cannot be divided among its heads, or the picture among its patches; or the layers are
                of no network.
        """
        sizes = replace(self, **{name: value for name, value in given.items() if value is not None})
        if isinstance(sizes.vision_layers, list):
            sizes = replace(sizes, vision_layers=tuple(sizes.vision_layers))
        if sizes.is_resnet:
            sizes = replace(sizes, patch_size=_STRIDE)
        parts = (("vision_width", "vision_heads"), ("text_width", "text_heads"), ("image_size", "patch_size"))
        problems = [
            f"backbone.{whole}: {getattr(sizes, whole)} is no multiple of {part} ({getattr(sizes, part)})."
            for whole, part in parts
            if sizes.length_of(whole) % getattr(sizes, part)
        ]
        if not isinstance(sizes.vision_layers, int) and len(sizes.vision_layers) != _STAGES:
            problems.append(
                f"backbone.vision_layers: {list(sizes.vision_layers)} has {len(sizes.vision_layers)} numbers, expected "
                f"one for a transformer or {_STAGES} for the stages of a ResNet."
            )
        if problems:
            raise ConfigError(*problems)
        return sizes

    def length_of(self, name: str) -> int:
        """A width as it is divided: a ResNet's attention reads 32 times the width of its stem."""
        length: int = getattr(self, name)
        return _WIDENING * length if name == "vision_width" and self.is_resnet else length

    def config(self) -> dict[str, Any]:
        """As open_clip's `model_cfg`."""
        return {
            "embed_dim": self.embed_dim,
            "quick_gelu": self.quick_gelu,
            "vision_cfg": {
                "image_size": self.image_size, "patch_size": self.patch_size, "width": self.vision_width,
                "layers": self.vision_layers if isinstance(self.vision_layers, int) else list(self.vision_layers),
                "head_width": self.length_of("vision_width") // self.vision_heads,
                "mlp_ratio": self.vision_mlp_ratio,
            },
            "text_cfg": {
                "context_length": self.context_length, "vocab_size": self.vocab_size, "width": self.text_width,
                "heads": self.text_heads, "layers": self.text_layers,
            },
        }  # fmt: skip


SIZE_NAMES: Final = tuple(field.name for field in fields(ClipSizes))


@dataclass(frozen=True)
class ClipModel:
    """What a configuration of open_clip says."""

    sizes: ClipSizes
    names_tokenizer: bool = False
    """Whether it comes with a tokenizer of its own; others use CLIP's."""


def model_of_config(config: Mapping[str, Any], source: str) -> ClipModel:
    """Sizes and tokenizer out of an open_clip `model_cfg`.

    Args:
        config: The configuration.
        source: Where it comes from, for error messages.

    Raises:
        ConfigError: It is of a network with other parts than a vision transformer or ResNet and a text transformer.
    """
    vision, text = dict(config.get("vision_cfg", {})), dict(config.get("text_cfg", {}))
    foreign = [name for name in config if name not in _TOP]
    foreign += [f"vision_cfg.{name}" for name in vision.keys() - _VISION]
    foreign += [f"text_cfg.{name}" for name in text.keys() - _TEXT - _TOKENIZER]
    if config.get("custom_text"):
        foreign.append("custom_text")
    if foreign:
        raise ConfigError(
            f"backbone: '{source}' is not built of a plain vision tower and a plain text transformer, it has "
            f"{', '.join(sorted(foreign))}; choose a model such as ViT-B-32, ViT-L-14 or RN50."
        )
    layers = vision.get("layers", 12)
    is_resnet = not isinstance(layers, int)
    width = vision.get("width", 768)
    sizes = ClipSizes(
        embed_dim=config["embed_dim"],
        image_size=vision.get("image_size", 224),
        patch_size=_STRIDE if is_resnet else vision.get("patch_size", 16),
        vision_width=width,
        vision_layers=tuple(layers) if is_resnet else layers,
        vision_heads=(_WIDENING * width if is_resnet else width) // vision.get("head_width", 64),
        vision_mlp_ratio=vision.get("mlp_ratio", 4.0),
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        text_width=text.get("width", 512),
        text_layers=text.get("layers", 12),
        text_heads=text.get("heads", 8),
        quick_gelu=config.get("quick_gelu", False),
    )
    return ClipModel(sizes, names_tokenizer=any(text.get(name) for name in _TOKENIZER))


def model_by_name(name: str) -> ClipModel:
    """A model that open_clip knows.

    Raises:
        ConfigError: There is none of this name, or it is of another kind.
        MissingExtraError: open_clip is not installed.
    """
    open_clip = require("open_clip", extra="clip")
    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(f"backbone.model: open_clip has no model '{name}'; {nearest(name, known)}")
    return model_of_config(open_clip.get_model_config(name), name)


def model_of_file(file: Path, source: str) -> ClipModel:
    """A model by its `open_clip_config.json`.

    Args:
        file: The configuration.
        source: What it belongs to, for error messages.

    Raises:
        ConfigError: It is of another kind of network.
        WeightsError: The file is missing, or not as open_clip writes it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        config["embed_dim"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"backbone.weights: '{source}' has no readable {CONFIG_FILE} with a 'model_cfg', as open_clip writes it"
        ) from error
    return model_of_config(config, source)
