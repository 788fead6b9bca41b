"""Accuracy of averaged views."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class VotedAccuracy(Metric):
    """Share of samples whose averaged logits are right, over several votes.

    Args:
        repeats: How many votes are held on each sample.
        best: Give the best vote instead of the mean.
    """

    right: Tensor
    total: Tensor

    def __init__(self, repeats: int, *, best: bool) -> None:
        super().__init__()
        self.best = best
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(repeats, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, repeat: int, logits: Tensor, labels: Tensor) -> None:
        """Add one vote on a batch: averaged logits (B, C) and labels (B,)."""
        self.right[repeat] += (logits.argmax(-1) == labels).sum()
        self.total[repeat] += len(labels)

    def compute(self) -> Tensor:
        """The share, a scalar."""
        shares = self.right / self.total
        return shares.amax() if self.best else shares.mean()


def voting_metrics(votes: int, repeats: int) -> nn.ModuleDict:
    """The figures of a vote, none where there is a single view."""
    metrics: dict[str, Metric] = {}
    if votes > 1:
        metrics["accuracy_voted"] = VotedAccuracy(repeats, best=False)
        if repeats > 1:
            metrics["accuracy_voted_best"] = VotedAccuracy(repeats, best=True)
    return nn.ModuleDict(metrics)
