"""LoRAT's head: a score and a box for every cell of the search picture."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.ranges import PositiveFloat
from peft_modal_heads.dense import level, level_widths


class TrackingOutput(NamedTuple):
    """What was found in each cell of the search picture."""

    scores: Tensor
    """Logits (B, rows, columns), float32."""
    boxes: Tensor
    """x1, y1, x2, y2 as shares of the picture's sides, (B, rows, columns, 4) float32; they may leave 0..1."""


class TrackingMLP(nn.Module):
    """Two MLPs on every search token (Lin et al., ECCV 2024, arXiv:2403.05231, section 3.4).

    Each is three linears of the tokens' width with GELU between them; one gives the score, the other the distances from
    the cell's centre to the four sides of the box, through a sigmoid, in units of the picture.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Ignored: a tracker knows no classes; supplied by the program.
        init_std: Deviation of the initial weights. The authors' 0.02 is made for 384 and more channels; of narrower
            tokens it leaves next to nothing behind three linears, and training takes long to begin.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(self, spec: FeatureSpec, num_outputs: int = 0, *, init_std: PositiveFloat = 0.02) -> None:
        del num_outputs
        super().__init__()
        self.last = len(level_widths(spec, least=1, head="tracking_mlp")) - 1
        width = spec.levels[self.last]
        self.cls = _three_linears(width, 1, init_std)
        self.reg = _three_linears(width, 4, init_std)

    def forward(self, features: Features) -> TrackingOutput:
        """Scores and boxes of every cell of the last feature map."""
        tokens = level(features, self.last).permute(0, 2, 3, 1)  # (B, R, C, D)
        scores = _through(self.cls, tokens).squeeze(-1).float()
        sides = _through(self.reg, tokens).float().sigmoid()
        return TrackingOutput(scores, boxes_around(cell_centres(scores), sides))


def cell_centres(scores: Tensor) -> Tensor:
    """Centres x, y of the cells of a map (B, R, C) as shares of its sides, (R, C, 2)."""
    rows, columns = scores.shape[-2:]
    y, x = ((torch.arange(n, device=scores.device, dtype=scores.dtype) + 0.5) / n for n in (rows, columns))
    return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)


def boxes_around(centres: Tensor, sides: Tensor) -> Tensor:
    """Boxes x1, y1, x2, y2 (..., 4) by their distances to the left, top, right and bottom of the centres (..., 2)."""
    return torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], dim=-1)


def _three_linears(width: int, outputs: int, init_std: float) -> nn.ModuleList:
    linears = [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, outputs)]
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=init_std)
        nn.init.zeros_(linear.bias)
    return nn.ModuleList(linears)


def _through(linears: nn.ModuleList, x: Tensor) -> Tensor:
    *inner, last = linears
    for linear in inner:
        x = functional.gelu(linear(x))
    return last(x)
