"""The linear head."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal_heads.pooling import Pooling, require_two


class LinearHead(nn.Module):
    """Pooled features through one linear layer.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of predictions per sample; supplied by the program.
        pool: Names of what is read, concatenated; None for every single token, every export and `max`.
        normalise: BatchNorm without affine parameters before the linear, so that features of small scale are not
            punished for it.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self, spec: FeatureSpec, num_outputs: int, *, pool: list[str] | None = None, normalise: bool = False
    ) -> None:
        super().__init__()
        self.pool = Pooling(spec, pool)
        self.normalise = normalise
        self.norm = nn.BatchNorm1d(self.pool.width, affine=False) if normalise else nn.Identity()
        self.linear = nn.Linear(self.pool.width, num_outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits (B, num_outputs)."""
        pooled = self.pool(features)
        return self.linear(self.norm(require_two(pooled) if self.normalise and self.training else pooled))
