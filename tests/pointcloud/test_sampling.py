"""Farthest point sampling and neighbourhoods against loops that follow the kernel's definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_modal.errors import ConfigError, DataError
from peft_modal_pointcloud.sampling import (
    Grouping,
    farthest_point_sample,
    gather_points,
    group,
    knn,
    select_patches,
)


def clouds(batch: int, num: int, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, num, 3, generator=torch.Generator().manual_seed(seed)) * 0.5


def kernel_loop(cloud: Tensor, num: int) -> list[int]:
    """The published kernel with one thread, point by point."""
    points = cloud.double().tolist()
    running = [1e10] * len(points)
    picked = [0]
    while len(picked) < num:
        last, best, farthest = points[picked[-1]], -1.0, 0
        for index, point in enumerate(points):
            if sum(x * x for x in point) <= 1e-3:
                continue
            running[index] = min(running[index], sum((x - y) ** 2 for x, y in zip(point, last, strict=True)))
            if running[index] > best:
                best, farthest = running[index], index
        picked.append(farthest)
    return picked


def test_fps_follows_the_kernel_point_by_point():
    points = clouds(3, 50)
    points[:, [0, 7, 20, 21]] *= 0.01

    picked = farthest_point_sample(points, 20)

    assert picked.dtype == torch.int64
    assert picked.tolist() == [kernel_loop(cloud, 20) for cloud in points]


def test_fps_never_picks_a_point_near_the_origin_except_the_first():
    points = clouds(2, 12) + 1.0
    points[0, 5] = torch.tensor([0.03, 0.0, 0.0])
    points[1, 0] = 0.0

    picked = farthest_point_sample(points, 30)

    assert 5 not in picked[0]
    assert picked[1, 0] == 0
    assert 0 not in picked[1, 1:]


def test_fps_takes_the_near_origin_limit_as_inclusive_in_double_precision():
    above = torch.tensor(1e-3, dtype=torch.float32)  # lies above 0.001
    below = torch.nextafter(above, torch.tensor(0.0))
    x, candidates = torch.tensor(0.03), torch.linspace(0.0099, 0.0101, 200_001)
    norms = x * x + candidates * candidates
    for limit, is_picked in ((above, True), (below, False)):
        y = candidates[(norms == limit).nonzero()[0]]
        points = torch.tensor([[[1.0, 0, 0], [x.item(), y.item(), 0]]])
        assert (1 in farthest_point_sample(points, 2)[0]) is is_picked


def test_fps_takes_the_first_of_equally_far_points():
    points = torch.tensor([[[1.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, -2, 0]]])

    assert farthest_point_sample(points, 2).tolist() == [[0, 1]]


def test_fps_repeats_points_once_all_are_used():
    points = clouds(1, 5) + 1.0

    picked = farthest_point_sample(points, 9)[0].tolist()

    assert sorted(picked[:5]) == [0, 1, 2, 3, 4]
    assert picked[5:] == [0, 0, 0, 0]


def test_fps_of_a_cloud_at_the_origin_repeats_index_zero():
    assert farthest_point_sample(torch.zeros(2, 6, 3), 4).tolist() == [[0] * 4] * 2


def test_fps_does_not_depend_on_the_other_clouds():
    points = clouds(4, 40)

    together = farthest_point_sample(points, 10)

    for cloud, picked in zip(points, together, strict=True):
        assert torch.equal(farthest_point_sample(cloud[None], 10)[0], picked)


def test_knn_lists_every_centre_first_and_then_by_distance():
    points = clouds(2, 30)
    centres = points[:, 3:9]

    found = knn(points, centres, 7)

    distance = (centres[:, :, None].double() - points[:, None].double()).norm(dim=-1)
    assert torch.equal(found, distance.argsort(-1)[..., :7])
    assert found[0, :, 0].tolist() == [3, 4, 5, 6, 7, 8]


def test_knn_tells_points_apart_that_lie_far_from_the_origin():
    offset = torch.tensor([100.0, 0, 0])
    points = torch.stack([offset + torch.tensor([0.0, 1e-3 * i, 0]) for i in range(8)])[None]

    found = knn(points, points[:, :1], 4)  # the matrix-product form of the distance loses 1e-6 beside 1e4

    assert found.tolist() == [[[0, 1, 2, 3]]]


def test_indices_are_the_same_under_autocast_and_for_double_precision():
    points = clouds(2, 64)
    plain = farthest_point_sample(points, 16)
    near = knn(points, gather_points(points, plain), 8)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(farthest_point_sample(points, 16), plain)
        assert torch.equal(knn(points, gather_points(points, plain), 8), near)
    assert torch.equal(farthest_point_sample(points.double(), 16), plain)


def test_group_centres_every_patch_and_keeps_its_scale():
    points = clouds(2, 64)

    neighbourhood, centres = group(points, num_group=8, group_size=5)

    assert neighbourhood.shape == (2, 8, 5, 3)
    assert torch.equal(neighbourhood[:, :, 0], torch.zeros(2, 8, 3))
    absolute = neighbourhood + centres[:, :, None]
    gap = (absolute[:, :, :, None] - points[:, None, None]).abs().sum(-1).amin(-1)
    assert gap.max() < 1e-6


def test_group_passes_gradients_to_the_points_but_not_through_the_indices():
    points = clouds(2, 32).requires_grad_()
    neighbourhood, centres = group(points, num_group=4, group_size=6)
    weight = torch.randn(neighbourhood.shape)

    (neighbourhood * weight).sum().backward()

    expected = torch.zeros_like(points)
    picked = farthest_point_sample(points, 4)
    near = knn(points, centres, 6)
    for b in range(2):
        for g in range(4):
            expected[b].index_add_(0, near[b, g], weight[b, g])
            expected[b, picked[b, g]] -= weight[b, g].sum(0)
    assert torch.allclose(points.grad, expected, atol=1e-5)
    assert not farthest_point_sample(points, 4).requires_grad


def test_grouping_module_has_no_state_and_equals_the_function():
    module = Grouping(num_group=4, group_size=3)
    points = clouds(2, 20)

    assert not module.state_dict()
    for ours, theirs in zip(module(points), group(points, num_group=4, group_size=3), strict=True):
        assert torch.equal(ours, theirs)


def test_more_neighbours_than_points_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"k is 32, but every cloud has 20 points"):
        group(clouds(2, 20), num_group=4, group_size=32)


def test_zero_centres_are_refused():
    with pytest.raises(ConfigError, match="num is 0"):
        farthest_point_sample(clouds(1, 4), 0)


@pytest.mark.parametrize("shape", [(20, 3), (2, 20, 6), (2, 0, 3)], ids=["one-cloud", "with-normals", "empty"])
def test_wrong_shapes_are_refused_with_the_shape_seen(shape):
    with pytest.raises(DataError, match=rf"got \({shape[0]}"):
        group(torch.zeros(shape), num_group=2, group_size=2)


def test_centres_of_other_clouds_are_refused():
    with pytest.raises(DataError, match="2 clouds but centres of 3"):
        knn(clouds(2, 20), clouds(3, 4), 2)


def test_select_patches_keeps_patch_order():
    values = torch.arange(8).reshape(2, 4)
    chosen = torch.tensor([[True, False, False, True], [False, True, True, False]])

    assert select_patches(values, chosen).tolist() == [[0, 3], [5, 6]]


def test_select_patches_refuses_uneven_rows_and_other_types():
    values = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match="1 to 2 patches per cloud"):
        select_patches(values, torch.tensor([[True, False, False], [True, True, False]]))
    with pytest.raises(ConfigError, match=r"boolean tensor \(2, 3\)"):
        select_patches(values, torch.ones(2, 3))


@pytest.mark.parametrize(("num", "centres", "k"), [(200, 7, 16), (33, 5, 33), (64, 64, 1), (50, 3, 48), (1024, 64, 32)])
def test_neighbours_on_a_cpu_are_those_of_every_distance_sorted(num, centres, k):
    points = clouds(3, num, seed=num)
    points[:, -5:] = points[:, :5]  # some twice
    middle = clouds(3, centres, seed=k)

    found = knn(points, middle, k)

    distance = (middle[:, :, None] - points[:, None]).square().sum(-1)
    expected = distance.sort(-1).values[..., :k]
    torch.testing.assert_close(distance.gather(2, found), expected, rtol=1e-5, atol=1e-7)
    assert all(len(set(row)) == k for row in found.flatten(0, 1).tolist())


def test_points_at_one_place_are_each_a_neighbour_once():
    found = knn(torch.ones(2, 12, 3), torch.ones(2, 4, 3), 9)

    assert all(len(set(row)) == 9 for row in found.flatten(0, 1).tolist())


def test_points_without_a_number_do_not_stop_the_search():
    points = clouds(1, 20)
    points[0, 3] = torch.nan

    assert knn(points, points[:, :2], 20).shape == (1, 2, 20)
