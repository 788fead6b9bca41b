"""What heads for dense prediction share: the feature maps that they read, and what they return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.errors import ConfigError


class DenseOutput(NamedTuple):
    """Logits of every pixel, (B, K, h, w) each, at any resolution."""

    logits: Tensor
    auxiliary: tuple[Tensor, ...] = ()
    """Of the auxiliary heads, while training."""


def level_widths(spec: FeatureSpec, *, least: int, head: str) -> tuple[int, ...]:
    """Widths of the feature maps.

    Args:
        spec: What the features will hold.
        least: How many the head needs.
        head: Its name, for the sentence.

    Raises:
        ConfigError: There are fewer, or they are no maps.
    """
    if spec.levels and spec.layout is not None and spec.layout.body == "points":
        raise ConfigError(f"head '{head}' reads feature maps, and the backbone gives points; use pointcloud_parts")
    if len(spec.levels) < least:
        raise ConfigError(
            f"head '{head}' reads {least} feature maps, and the backbone gives {len(spec.levels)}; set "
            f"backbone.levels={least}"
        )
    return spec.levels


def level(features: Features, number: int) -> Tensor:
    """The feature map of a level, (B, C, h, w); of points, their tokens (B, G, D)."""
    return features.extras[f"level.{number}"]


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps at the resolution of others, bilinearly."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return functional.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


def conv_norm_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """A convolution without bias, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
