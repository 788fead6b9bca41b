"""Judges of generated pictures of single objects: the colour by counting pixels, the shape by a classifier of its own.

Neither has seen what made the pictures: the classifier is trained here, on drawn scenes alone.
"""

from __future__ import annotations

import itertools
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.data.drawn.draw import draw_scenes
from peft_modal.data.drawn.words import COLOURS, SHAPES
from peft_modal.data.seeding import seeded

NEAR: Final = 0.3
"""Largest distance in RGB at which a pixel counts as of a colour."""
FEWEST: Final = 8
"""Pixels that a 32 pixel picture needs of a colour to be said to have it; more in proportion to its area."""


def colour_of(pictures: Tensor) -> Tensor:
    """The named colour that most pixels are near, its place in COLOURS, -1 where too few are near any; (n,) int64.

    Args:
        pictures: (n, 3, S, S) in 0..1.
    """
    palette = torch.tensor(list(COLOURS.values()), device=pictures.device)
    distance = (pictures[:, None] - palette[None, :, :, None, None]).norm(dim=2)
    nearest = distance.argmin(1, keepdim=True)
    near = (distance < NEAR) & (torch.arange(len(palette), device=pictures.device)[None, :, None, None] == nearest)
    counts = near.flatten(2).sum(-1)
    fewest = FEWEST * pictures.shape[-1] ** 2 / 32**2
    best, place = counts.max(1)
    return torch.where(best >= fewest, place, -1)


class ShapeJudge(nn.Module):
    """A small convolutional network that names the shape of a single object.

    Args:
        width: Channels of its first layer.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in itertools.pairwise(widths)
            )
        )
        self.last = nn.Linear(widths[-1] * 16, len(SHAPES))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (n, shapes) of pictures (n, 3, S, S) in 0..1."""
        found = self.layers(pictures * 2 - 1)
        return self.last(functional.adaptive_avg_pool2d(found, 4).flatten(1))


def train_shape_judge(*, steps: int = 600, batch_size: int = 64, seed: int = 0) -> ShapeJudge:
    """A judge trained on single objects of every pair, at noise and blur that generated pictures may have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ShapeJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    judge.train()
    for step in range(steps):
        generator = seeded("shape judge", seed, step)
        drawn = draw_scenes(batch_size, generator, pairs="all", objects=1)
        assert drawn.scenes is not None
        noise = 0.08 * torch.rand(batch_size, 1, 1, 1, generator=generator)
        pictures = drawn.images + noise * torch.randn(drawn.images.shape, generator=generator)
        if step % 2:
            pictures = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        optimizer.zero_grad()
        loss = functional.cross_entropy(judge(pictures), drawn.scenes.shape[:, 0])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def judge_accuracy(judge: ShapeJudge, *, count: int = 512, seed: int = 1) -> float:
    """Share of true pictures of single objects whose shape a judge names."""
    drawn = draw_scenes(count, seeded("judged", seed), pairs="all", objects=1)
    assert drawn.scenes is not None
    return float((judge(drawn.images).argmax(1) == drawn.scenes.shape[:, 0]).float().mean())
