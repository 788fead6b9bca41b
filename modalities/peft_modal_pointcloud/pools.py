"""From stored clouds to the network's input, as the code does that all published point transformers share.

Training: each cloud in a new order; farthest point sampling to a pool; the same places of every cloud's pool; then
augmentation. Evaluation: farthest point sampling from the first stored point on, and nothing random.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import torch
from torch import Generator, Tensor

from peft_modal.data.cache import cached_tensors
from peft_modal.data.epochs import Batch
from peft_modal.data.splits import ShuffledBatches
from peft_modal_pointcloud.augment import Augmentation
from peft_modal_pointcloud.batches import CloudSet
from peft_modal_pointcloud.sampling import farthest_point_sample, gather_points

Draw = Literal["batch", "cloud"]
"""Whether all clouds of a batch give the points at the same places of their pools, or each at its own."""

_AT_ONCE: Final = 32
_VERSION: Final = 1
"""Of the sampling; to be raised with every change that picks other points."""


def farthest_of_each(clouds: Tensor, count: int) -> Tensor:
    """`count` points of each cloud (n, P, 3) by farthest point sampling from its first point on: (n, count, 3).

    What was picked is kept in the cache folder, since large sets take a minute.
    """
    key = {"version": _VERSION, "clouds": hashlib.sha256(clouds.contiguous().numpy().data).hexdigest(), "count": count}

    def make() -> dict[str, Tensor]:
        picked = [farthest_point_sample(some, count).int() for some in torch.split(clouds, _AT_ONCE)]
        return {"picked": torch.cat(picked)}

    return gather_points(clouds, cached_tensors("farthest", key, make)["picked"].long())


class PooledBatches(ShuffledBatches):
    """The `BatchSource` of a training set of stored clouds.

    Args:
        clouds: Clouds (n, P, 3) and their labels.
        batch_size: Clouds per batch.
        num_points: Points drawn of each pool.
        pool_points: Points per pool, at most P.
        draw: See `Draw`; the published code draws once per `batch`.
        augmentation: Applied last.
        seed: Of everything random.
    """

    def __init__(
        self,
        clouds: CloudSet,
        batch_size: int,
        num_points: int,
        *,
        pool_points: int,
        draw: Draw,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        super().__init__(clouds.clouds, batch_size, seed=seed)
        self.clouds = clouds
        self.num_points = num_points
        self.pool_points = pool_points
        self.draw: Draw = draw
        self.augmentation = augmentation

    def make(self, chosen: list[int], generator: Generator) -> Batch:
        """Points (B, num_points, 3) and labels of these clouds."""
        stored = [self.clouds.clouds[i] for i in chosen]
        # The order decides where sampling begins, and with it which points make the pool.
        points = torch.stack([cloud[torch.randperm(len(cloud), generator=generator)] for cloud in stored])
        pool = gather_points(points, farthest_point_sample(points, self.pool_points))
        draws = len(chosen) if self.draw == "cloud" else 1
        places = [torch.randperm(self.pool_points, generator=generator)[: self.num_points] for _ in range(draws)]
        points = gather_points(pool, torch.stack(places).expand(len(chosen), -1))
        batch: Batch = {"points": self.augmentation(points, generator)}
        if self.clouds.labels is not None:
            batch["label"] = self.clouds.labels[chosen]
        return batch
