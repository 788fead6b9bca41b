"""The head that leaves features as they are."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec


class Identity(nn.Module):
    """The backbone's tokens unchanged, for tasks whose loss is taken on them (contrast, reconstruction, denoising).

    Args:
        spec: Not used; supplied by the program.
        num_outputs: Not used; supplied by the program.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(self, spec: FeatureSpec, num_outputs: int) -> None:
        del spec, num_outputs
        super().__init__()

    def forward(self, features: Features) -> Tensor:
        """Tokens as the backbone returns them."""
        return features.tokens
