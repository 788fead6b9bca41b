"""A head for sequences of patches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.errors import ConfigError


class AttentivePooling(nn.Module):
    """The class token beside a weighted mean over the patches of all channels, through one linear.

    The weights are a softmax over the products of each patch with learned queries, so that a short event can count more
    than its share of the series.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of classes; supplied by the program.
        num_queries: Weighted means that are concatenated.
        dropout: Probability of zeroing an entry before the linear.

    Raises:
        ConfigError: The features are no sequence with a class token, or a number is out of range.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(self, spec: FeatureSpec, num_outputs: int, *, num_queries: int = 2, dropout: float = 0.1) -> None:
        if num_queries < 1:
            raise ConfigError(f"head.num_queries: {num_queries} is below 1")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"head.dropout: {dropout} is outside 0..1")
        if "cls" not in spec.available():
            raise ConfigError("head: attentive_pooling needs a class token, which this backbone has not; use 'linear'")
        super().__init__()
        self.query = nn.Linear(spec.width, num_queries, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear((1 + num_queries) * spec.width, num_outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits (B, num_outputs)."""
        tokens, layout = features.tokens, features.layout
        assert layout is not None
        patches = tokens[:, layout.slice(layout.body_name, tokens.shape[1])]  # (B, C*N, D)
        weights = (self.query(patches) / patches.shape[-1] ** 0.5).softmax(1)  # (B, C*N, Q)
        pooled = (weights.transpose(1, 2) @ patches).flatten(1)  # (B, Q*D)
        cls_token = tokens[:, layout.slice("cls", tokens.shape[1])].flatten(1)
        return self.linear(self.dropout(torch.cat([cls_token, pooled], dim=-1)))
