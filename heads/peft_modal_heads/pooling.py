"""Pooling: what a head reads of the features, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_modal.anatomy import MEAN_OF, Features, FeatureSpec
from peft_modal.errors import ConfigError, TrainingError


def require_two(pooled: Tensor) -> Tensor:
    """`pooled` (B, width) itself, where a BatchNorm that trains can take statistics of it.

    Raises:
        TrainingError: It is of one sample only.
    """
    if len(pooled) < 2:
        raise TrainingError(
            "the head's BatchNorm needs two samples in a training batch, this one has 1; "
            "set data.batch_size to 2 or more, or give more training data"
        )
    return pooled


class Pooling(nn.Module):
    """Concatenates named pieces of the features.

    Pieces are segments of the token layout (`cls`), what methods export (`prompt`), `max` or `mean` over the data
    tokens, and `mean.cls+prompts` or `mean.all` over the tokens named, segments and exports alike.

    Args:
        spec: What the features will hold.
        pool: Names in the order of concatenation; None for what the backbone proposes, else every single token, every
            export and `max`.

    Raises:
        ConfigError: A name is not available, or the list is empty.
    """

    def __init__(self, spec: FeatureSpec, pool: list[str] | None = None) -> None:
        super().__init__()
        if pool is None and spec.default_pool is not None:
            pool = list(spec.default_pool)
        if pool is None:
            singles = [s.name for s in (spec.layout.segments if spec.layout else ()) if s.count == 1]
            pool = [*singles, *spec.exports, "max"]
        if not pool:
            raise ConfigError("head.pool: the list is empty; name at least one feature, e.g. [cls, max]")
        self.pool = tuple(pool)
        self.width = spec.pool_width(self.pool)
        self.averaged = {name: spec.averaged(name) for name in self.pool if name.startswith(MEAN_OF)}

    def forward(self, features: Features) -> Tensor:
        """(B, width)."""
        return torch.cat([self._piece(features, name) for name in self.pool], dim=-1)

    def _piece(self, features: Features, name: str) -> Tensor:
        if name in self.averaged:
            return torch.cat([_tokens(features, part) for part in self.averaged[name]], dim=1).mean(1)
        if name in features.extras:
            return features.extras[name].flatten(1)
        tokens = features.tokens
        if tokens.dim() == 4:
            data = tokens.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, D)
        elif features.layout is None:
            data = tokens
        else:
            if name not in {"max", "mean"}:
                return tokens[:, features.layout.slice(name, tokens.shape[1])].flatten(1)
            data = tokens[:, features.layout.slice(features.layout.body_name, tokens.shape[1])]
        return data.max(1).values if name == "max" else data.mean(1)


def _tokens(features: Features, name: str) -> Tensor:
    """The tokens (B, N, D) of a segment, or what a method exports."""
    if name in features.extras:
        return features.extras[name]
    assert features.layout is not None
    return features.tokens[:, features.layout.slice(name, features.tokens.shape[1])]
