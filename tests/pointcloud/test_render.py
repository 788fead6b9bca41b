"""The point-cloud renderer."""

import pytest
import torch
from matplotlib.figure import Figure

from peft_modal_pointcloud.render import render, view


def drawn(points):
    axes = Figure(figsize=(2, 2)).add_axes((0, 0, 1, 1))
    axes.set_aspect("equal")
    render(axes, {"points": points}, None)
    return axes


def test_y_is_up_and_angles_and_lengths_are_kept():
    axes_of_space = view(torch.eye(3))

    torch.testing.assert_close(axes_of_space @ axes_of_space.T, torch.eye(3))
    assert axes_of_space[1, 1] > 0.9
    assert axes_of_space[1, 0] == 0


def test_every_point_is_drawn_inside_and_near_ones_last():
    points = torch.randn(200, 3)
    axes = drawn(points)
    (scatter,) = axes.collections

    offsets = torch.as_tensor(scatter.get_offsets().data)
    assert len(offsets) == 200
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert right - left == pytest.approx(high - low)
    assert bool(((offsets > torch.tensor([left, low])) & (offsets < torch.tensor([right, high]))).all())
    sizes = scatter.get_sizes()
    assert (sizes[1:] >= sizes[:-1]).all()
    assert view(points)[:, 2].argmax() == ((view(points)[:, :2] - offsets[-1]).abs().sum(-1)).argmin()


@pytest.mark.parametrize("points", [torch.zeros(1, 3), torch.ones(5, 3)], ids=["single", "equal"])
def test_a_cloud_without_extent_is_a_dot(points):
    assert len(drawn(points).collections[0].get_offsets()) == len(points)
