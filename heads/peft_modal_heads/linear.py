"""The linear head."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal_heads.pooling import Pooling, require_two


class LinearHead(nn.Module):
    """Pooled features through one linear layer.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of predictions per sample; supplied by the program.
        pool: Names of what is read, concatenated; None for every single token, every export and `max`.
        normalise: What stands before the linear. True or `batch`: a BatchNorm without affine parameters, so that
            features of small scale are not punished for it. `layer`: a trained LayerNorm, as in AST's own classifier.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self, spec: FeatureSpec, num_outputs: int, *, pool: list[str] | None = None,
        normalise: bool | Literal["batch", "layer"] = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pool = Pooling(spec, pool)
        self.takes_statistics = normalise in {True, "batch"}
        if normalise == "layer":
            self.norm: nn.Module = nn.LayerNorm(self.pool.width)
        else:
            self.norm = nn.BatchNorm1d(self.pool.width, affine=False) if self.takes_statistics else nn.Identity()
        self.linear = nn.Linear(self.pool.width, num_outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits (B, num_outputs)."""
        pooled = self.pool(features)
        return self.linear(self.norm(require_two(pooled) if self.takes_statistics and self.training else pooled))
