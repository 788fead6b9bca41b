"""The classification head of Point-MAE fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.ranges import DropRate, PositiveInt
from peft_modal_heads.pooling import Pooling, require_two


class PointCloudMLP(nn.Module):
    """Two hidden layers with BatchNorm, ReLU and dropout, then a linear (Pang et al., ECCV 2022, arXiv:2203.06604).

    Parameters carry the authors' names `cls_head_finetune.{0,1,4,5,8}`. A batch needs two samples while training.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of classes; supplied by the program.
        pool: Names of what is read, concatenated: `[cls, max]` for the plain network, `[cls, prompt, max]` for IDPT's
            `all`. None for every single token, every export of the method and `max`, which gives these two.
        hidden_dim: Width of the hidden layers.
        dropout: Probability of zeroing a hidden channel.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self,
        spec: FeatureSpec,
        num_outputs: int,
        *,
        pool: list[str] | None = None,
        hidden_dim: PositiveInt = 256,
        dropout: DropRate = 0.5,
    ) -> None:
        super().__init__()
        self.pool = Pooling(spec, pool)
        self.cls_head_finetune = nn.Sequential(
            nn.Linear(self.pool.width, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, num_outputs),
        )

    def forward(self, features: Features) -> Tensor:
        """Logits (B, num_outputs)."""
        pooled = self.pool(features)
        return self.cls_head_finetune(require_two(pooled) if self.training else pooled)
