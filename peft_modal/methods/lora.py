"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter, LowRankUpdate
from peft_modal.attach.updates import LowRankInit
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method
from peft_modal.ranges import DropRate, PositiveFloat, PositiveInt


class LoRA(Method):
    """Low-rank updates of chosen weights (Hu et al., ICLR 2022, arXiv:2106.09685).

    y = W x + scale * B A x with A (rank, in) and B (out, rank); B starts at zero, but for `init: trunc_normal`. For a
    convolution A has the kernel and B is 1x1. Row slices of a fused tensor (`attn.q` of a packed qkv) get their own
    pair; the exact role of the whole tensor (`attn.qkv`) gets one pair. Merges exactly.

    Args:
        sites: Weight sites to update; see `Selector`.
        rank: Rank of every update.
        alpha: Numerator of the scale: alpha / rank, or alpha / sqrt(rank) with `rank_stabilised`. None for a scale
            of 1.
        dropout: Probability of zeroing an input channel of the update; impossible where a weight is read inside a
            function (MultiheadAttention).
        rank_stabilised: Divide by sqrt(rank) (Kalajdzievski, 2023, arXiv:2312.03732).
        init: `kaiming` as released, or `gaussian` as in the paper's text (standard deviation 1/rank). With
            `trunc_normal` both factors are drawn with standard deviation 0.02, as on audio (Cappellazzo et al., MLSP
            2024, arXiv:2312.03694) and by LoRAT (ECCV 2024); the network then starts elsewhere.
    """

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = ["attn.q", "attn.v"],  # noqa: B006 — never changed
        rank: PositiveInt = 8, alpha: PositiveFloat | None = None, dropout: DropRate = 0.0,
        rank_stabilised: bool = False, init: LowRankInit = "kaiming",
    ) -> None:  # fmt: skip
        self.sites = Selector.parse(sites)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.rank_stabilised = rank_stabilised
        self.init: LowRankInit = init

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """B is zero."""
        return self.init != "trunc_normal"

    @property
    def scale(self) -> float:
        """Factor of B A."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def build(self, adapter: Adapter) -> None:
        """One update per selected site.

        Raises:
            AttachError: The rank is above both sides of a weight.
        """
        for site in adapter.backbone.anatomy.select(self.sites, needs=("call", "weight")):
            largest = max(site.shape[0], math.prod(site.shape[1:]))
            if self.rank > largest:
                raise AttachError(f"method.rank: {self.rank} is above {largest}, the larger side of '{site.name}'")
            update = LowRankUpdate(site.shape, rank=self.rank, scale=self.scale, dropout=self.dropout, init=self.init)
            adapter.low_rank(site, update)
