"""PyTorch3D's searches pick what ours pick; where it is not installed, a stand-in does what its documentation says."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_modal.errors import ConfigError, DataError, MissingExtraError
from peft_modal_pointcloud import sampling, sampling_pytorch3d
from peft_modal_pointcloud.backbone import PointMAEBackbone

IS_INSTALLED = importlib.util.find_spec("pytorch3d") is not None


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor,
    K: int,  # noqa: N803 — its names
    random_start_point: bool,
) -> tuple[Tensor, Tensor]:
    """The first `lengths` points only, from the first on; -1 where there are fewer than K."""
    assert not random_start_point
    picked = torch.full((len(points), K), -1)
    for cloud, row, length in zip(points, picked, lengths.tolist(), strict=True):
        running = torch.full((length,), float("inf"))
        row[0] = 0
        for step in range(1, min(K, length)):
            running = torch.minimum(running, (cloud[:length] - cloud[row[step - 1]]).square().sum(-1))
            row[step] = running.argmax()
    return points, picked


def knn_points(p1: Tensor, p2: Tensor, K: int, return_sorted: bool) -> Any:  # noqa: N803 — its names
    assert return_sorted
    squared = (p1[:, :, None] - p2[:, None]).square().sum(-1)
    found = squared.topk(K, largest=False)
    return SimpleNamespace(dists=found.values, idx=found.indices, knn=None)


@pytest.fixture(autouse=True)
def _module(monkeypatch):
    if IS_INSTALLED:
        return
    module, ops = ModuleType("pytorch3d"), ModuleType("pytorch3d.ops")
    ops.sample_farthest_points, ops.knn_points = sample_farthest_points, knn_points
    module.ops = ops
    module.__spec__ = importlib.util.spec_from_loader("pytorch3d", None)
    monkeypatch.setitem(sys.modules, "pytorch3d", module)
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", ops)


def clouds(batch: int, num: int, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, num, 3, generator=torch.Generator().manual_seed(seed)) * 0.5


def near_the_origin(case: str) -> Tensor:
    points = clouds(4, 40)
    if case == "some":
        points[:, [3, 9, 30]] *= 0.01
        points[2, 20:] *= 0.01
    elif case == "first":
        points[1:, :4] *= 0.01
    elif case == "all":
        points *= 0.01
    elif case == "twice":
        points[:, 20:] = points[:, :20]
        points[1, [0, 20]] = 0.001
    return points


@pytest.mark.parametrize("num", [1, 12, 40, 47])
@pytest.mark.parametrize("case", ["none", "some", "first", "all", "twice"])
def test_it_picks_the_points_of_the_kernel(case, num):
    points = near_the_origin(case)
    assert torch.equal(
        sampling_pytorch3d.farthest_point_sample(points, num), sampling.farthest_point_sample(points, num)
    )


def test_its_neighbours_are_the_same():
    points, centres = clouds(3, 50), clouds(3, 7, seed=1)
    assert torch.equal(sampling_pytorch3d.knn(points, centres, 9), sampling.knn(points, centres, 9))


def test_a_backbone_gives_the_same_features_with_it():
    sizes = {"dim": 24, "depth": 2, "num_heads": 3, "num_group": 12, "group_size": 8, "pointnet_dims": [8, 16, 16]}
    own, theirs = (
        PointMAEBackbone(weights="random", **sizes, grouping=grouping).eval() for grouping in ("own", "pytorch3d")
    )
    batch = own.example_batch()
    batch["points"][:, 5] = 0.001
    torch.testing.assert_close(own(batch).tokens, theirs(batch).tokens)


def test_wrong_sizes_are_refused_as_ours_refuses_them():
    with pytest.raises(ConfigError, match="num is 0"):
        sampling_pytorch3d.farthest_point_sample(clouds(1, 4), 0)
    with pytest.raises(ConfigError, match="k is 5, but every cloud has 4"):
        sampling_pytorch3d.knn(clouds(1, 4), clouds(1, 2), 5)
    with pytest.raises(DataError, match="2 clouds but centres of 3"):
        sampling_pytorch3d.knn(clouds(2, 9), clouds(3, 2), 5)


def test_where_it_is_not_installed_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"backbone\.grouping: 'pytorch3d' is not installed; .*'own'"):
        PointMAEBackbone(weights="random", dim=24, depth=1, num_heads=3, grouping="pytorch3d")
