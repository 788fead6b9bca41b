"""No head: for tasks whose backbone's output is the prediction itself."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec


class IdentityHead(nn.Module):
    """Hands the backbone's output on: noise predictions, rebuilt pictures, embeddings.

    Args:
        spec: Ignored; supplied by the program.
        num_outputs: Ignored; supplied by the program.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(self, spec: FeatureSpec, num_outputs: int) -> None:
        del spec, num_outputs
        super().__init__()

    def forward(self, features: Features) -> Tensor:
        """The backbone's tokens as they are."""
        return features.tokens
