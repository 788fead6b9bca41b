"""A head: features in, predictions out."""

from __future__ import annotations

from typing import ClassVar

from peft_modal.anatomy import Features, FeatureSpec
from torch import Tensor, nn


class MeanLinear(nn.Module):
    """The mean over the data tokens through a linear layer.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of classes; supplied by the program.
        normalise: Divide by the mean's deviation over the channels first.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self, spec: FeatureSpec, num_outputs: int, *, normalise: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.width) if normalise else nn.Identity()
        self.linear = nn.Linear(spec.width, num_outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits (B, num_outputs)."""
        tokens, layout = features.tokens, features.layout
        if layout is not None:
            tokens = tokens[:, layout.slice(layout.body_name, tokens.shape[1])]
        return self.linear(self.norm(tokens.mean(1)))
