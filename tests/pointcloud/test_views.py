"""What a report shows of patches, and of PointGST's graph."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.pointgst import PointGST
from peft_modal_pointcloud.render import MARKS, SHOWN, STRONG, VALUES, render


@pytest.fixture
def cloud():
    return torch.randn(200, 3, generator=torch.Generator().manual_seed(0))


def test_patches_are_those_of_the_network(cloud):
    backbone = PointMAEBackbone.tiny()
    features = backbone({"points": cloud[None]})

    centres, patches = backbone.views({"points": cloud, "label": torch.tensor(1)}).values()

    torch.testing.assert_close(centres[MARKS], features.extras["centres"][0])
    assert len(patches["points"]) == 200 + 5 * 8
    assert torch.equal(patches[STRONG], torch.arange(240) >= 200)
    for i in range(5):
        members = patches["points"][patches[SHOWN] == i]
        distance = (cloud - patches[MARKS][i]).norm(dim=-1)
        torch.testing.assert_close(
            (members - patches[MARKS][i]).norm(dim=-1).sort().values, distance.sort().values[:8], atol=1e-5, rtol=0
        )


def test_a_view_leaves_no_trace_in_the_context(cloud):
    backbone = PointMAEBackbone.tiny()
    backbone.views({"points": cloud})
    other = backbone({"points": cloud[None] * 2})
    torch.testing.assert_close(other.extras["centres"][0], 2 * backbone({"points": cloud[None]}).extras["centres"][0])


def test_components_are_smooth_and_sub_graphs_cover_the_cloud(cloud):
    backbone = PointMAEBackbone.tiny()
    adapter = PointGST(local=8).attach(backbone)

    views = adapter.events.views({"points": cloud})

    frequencies = [float(title.rpartition(" ")[2]) for title in views if title.startswith("component")]
    assert len(frequencies) == 3
    assert frequencies == sorted(frequencies)
    for view in views.values():
        if VALUES in view:
            assert view[VALUES].shape == (200,)
            assert float(view[VALUES].abs().max()) <= 1 + 1e-5
    parts = views["3 sub-graphs of 8 centres"][SHOWN]
    assert set(parts.tolist()) == {0, 1, 2}


def test_samples_without_points_show_nothing():
    backbone = PointMAEBackbone.tiny()
    adapter = PointGST(local=8).attach(backbone)
    assert not backbone.views({"image": torch.zeros(3, 4, 4)})
    assert not adapter.events.views({"image": torch.zeros(3, 4, 4)})


def test_values_and_marks_are_drawn(cloud):
    axes = Figure(figsize=(2, 2)).add_axes((0, 0, 1, 1))
    values = torch.linspace(-1, 1, 200)
    render(axes, {"points": cloud, VALUES: values, MARKS: cloud[:3]}, None)
    points, marks = axes.collections
    assert len(marks.get_offsets()) == 3
    colours = torch.as_tensor(points.get_facecolors())[:, :3]
    assert len(torch.unique(colours, dim=0)) > 100
