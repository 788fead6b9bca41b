"""Two networks of two layers: one with tied weights, one with a BatchNorm."""

from __future__ import annotations

from numeric import randomise
from plain_backbone import PlainBackbone
from torch import Tensor, nn

from peft_modal.anatomy import AnatomyBuilder, FrozenMode


class Tied(nn.Module):
    """An embedding whose weight is also the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) * self.out(x)


def tied_backbone() -> PlainBackbone:
    net = Tied().double()
    randomise(net, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        b.op("embed", "embed")
        b.op("out", "out")

    return PlainBackbone(net, describe, example=(3, 4))


class Normalised(nn.Module):
    """A linear and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def normalised_backbone(frozen_mode: FrozenMode) -> PlainBackbone:
    net = Normalised()
    randomise(net, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        b.op("linear", "linear")
        b.op("norm", "norm")

    return PlainBackbone(net, describe, example=(4,), frozen_mode=frozen_mode)
