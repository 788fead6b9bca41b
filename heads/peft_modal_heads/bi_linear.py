"""The linear head with weights of few bits."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.methods.quantised import Bits, QuantisedMatrix
from peft_modal_heads.pooling import Pooling


class BiLinearHead(nn.Module):
    """Pooled features through one linear of few bits, without a bias (Jie et al., ICCV 2023, arXiv:2307.16867).

    The adapter file holds `bits` per weight. The released code has one bit here whatever the adapter has.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of predictions per sample; supplied by the program.
        pool: Names of what is read, concatenated; None for what the backbone proposes.
        bits: Bits per weight.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(self, spec: FeatureSpec, num_outputs: int, *, pool: list[str] | None = None, bits: Bits = 1) -> None:
        super().__init__()
        self.pool = Pooling(spec, pool)
        self.matrix = QuantisedMatrix(num_outputs, self.pool.width, bits)
        # As a linear's own start.
        bound = self.pool.width**-0.5
        nn.init.uniform_(self.matrix.weight, -bound, bound)

    def forward(self, features: Features) -> Tensor:
        """Logits (B, num_outputs)."""
        pooled = self.pool(features)
        return functional.linear(pooled, self.matrix().to(pooled.dtype))
