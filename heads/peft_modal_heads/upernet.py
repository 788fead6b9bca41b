"""UPerNet's head (Xiao et al., ECCV 2018, arXiv:1807.10221)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.ranges import DropRate, PositiveInt
from peft_modal_heads.dense import DenseOutput, conv_norm_relu, level, level_widths, resized

_BINS = (1, 2, 3, 6)
_AUXILIARY_LEVEL = 2


class UPerNet(nn.Module):
    """Pooling pyramid on the last of four maps, and a feature pyramid down to the first (Xiao et al., ECCV 2018).

    Maps of one resolution, as a plain ViT gives them, are first brought to 4, 2, 1 and 1/2 times it. The third map has
    an auxiliary head while training.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of classes; supplied by the program.
        width: Channels of the pyramids.
        auxiliary_width: Channels of the auxiliary head.
        dropout: Probability of zeroing a channel before the classifiers.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self,
        spec: FeatureSpec,
        num_outputs: int,
        *,
        width: PositiveInt = 256,
        auxiliary_width: PositiveInt = 256,
        dropout: DropRate = 0.1,
    ) -> None:
        super().__init__()
        widths = level_widths(spec, least=4, head="upernet")
        self.count = len(widths)
        self.pools = nn.ModuleList([conv_norm_relu(widths[-1], width, 1) for _ in _BINS])
        self.pooled = conv_norm_relu(widths[-1] + len(_BINS) * width, width, 3)
        self.lateral = nn.ModuleList([conv_norm_relu(w, width, 1) for w in widths[:-1]])
        self.smooth = nn.ModuleList([conv_norm_relu(width, width, 3) for _ in widths[:-1]])
        self.fused = conv_norm_relu(self.count * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_outputs, 1)
        self.auxiliary = nn.Sequential(
            conv_norm_relu(widths[_AUXILIARY_LEVEL], auxiliary_width, 3),
            nn.Dropout2d(dropout),
            nn.Conv2d(auxiliary_width, num_outputs, 1),
        )

    def forward(self, features: Features) -> DenseOutput:
        """Logits at the resolution of the first map."""
        maps = pyramid([level(features, i) for i in range(self.count)])
        top = maps[-1]
        pools = [
            resized(pool(functional.adaptive_avg_pool2d(top, bins)), top)
            for bins, pool in zip(_BINS, self.pools, strict=True)
        ]
        tower = [*(lateral(m) for lateral, m in zip(self.lateral, maps[:-1], strict=True))]
        tower.append(self.pooled(torch.cat([top, *pools], dim=1)))
        for lower, upper in reversed(list(pairwise(range(self.count)))):
            tower[lower] = tower[lower] + resized(tower[upper], tower[lower])
        smooth = [*(conv(m) for conv, m in zip(self.smooth, tower[:-1], strict=True)), tower[-1]]
        fused = self.fused(torch.cat([resized(m, smooth[0]) for m in smooth], dim=1))
        logits = self.classifier(self.dropout(fused))
        return DenseOutput(logits, (self.auxiliary(maps[_AUXILIARY_LEVEL]),) if self.training else ())


def pyramid(maps: list[Tensor]) -> list[Tensor]:
    """Maps of falling resolution; those of one resolution at 4, 2, 1, 1/2, 1/2, ... times it."""
    if len({m.shape[-2:] for m in maps}) > 1:
        return maps
    factors = (4.0, 2.0, 1.0, *(0.5 for _ in maps[3:]))
    return [
        m
        if factor == 1.0
        else functional.interpolate(m, scale_factor=factor, mode="bilinear", align_corners=False)
        if min(m.shape[-2:]) * factor >= 1
        else m
        for m, factor in zip(maps, factors, strict=True)
    ]
