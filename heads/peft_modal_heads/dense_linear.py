"""The linear head for dense prediction."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal_heads.dense import DenseOutput, level, level_widths


class DenseLinear(nn.Module):
    """BatchNorm and a 1x1 convolution on the last feature map.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of classes; supplied by the program.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(self, spec: FeatureSpec, num_outputs: int) -> None:
        super().__init__()
        widths = level_widths(spec, least=1, head="dense_linear")
        self.last = len(widths) - 1
        self.norm = nn.BatchNorm2d(widths[-1])
        self.classifier = nn.Conv2d(widths[-1], num_outputs, 1)

    def forward(self, features: Features) -> DenseOutput:
        """Logits at the resolution of the feature map."""
        return DenseOutput(self.classifier(self.norm(level(features, self.last))))
