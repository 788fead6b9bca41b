"""A small convolutional network with BatchNorm and without gradient checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import AnatomyBuilder, Backbone, Context, Features, FrozenMode


def _network() -> nn.Sequential:
    parts = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)]
    network = nn.Sequential(*parts)
    nn.init.normal_(network[1].running_mean)
    nn.init.uniform_(network[1].running_var, 0.5, 1.5)
    return network


class BatchNormBackbone(Backbone):
    """Convolution, BatchNorm, ReLU, convolution."""

    modality = "vision"

    def __init__(self, *, frozen_mode: FrozenMode = "eval") -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = _network()
        b = AnatomyBuilder(network)
        b.op("conv", "0")
        b.op("norm", "1")
        b.op("proj", "3")
        super().__init__(network, b.build(layouts={}), frozen_mode=frozen_mode)

    @property
    def feature_width(self) -> int:
        return 6

    @override
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        return Features(self.network(batch["image"]), None)

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, 3, 5, 5, generator=torch.Generator().manual_seed(1))}
