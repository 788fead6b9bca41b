"""Parts that every run's report has, and the look-up of renderers."""

import pytest

from peft_modal.errors import MissingExtraError, RegistryError
from peft_modal.registry import Plugin, Registry
from peft_modal.running.parameters import TRAINING_ONLY, parameters_section, trained_tensors
from peft_modal.running.report import read_curves


def registry(*targets, modality="smell"):
    plugins = [(Plugin(f"p{i}", modality=modality, renderer=target), f"d{i}") for i, target in enumerate(targets)]
    return Registry.from_plugins(plugins)


def test_curves_are_read_by_metric_and_split(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,test/loss,train/loss,val/accuracy,val/loss\n"
        "0,5,,2.5,,\n0,5,,,0.25,2.25\n1,11,,1.5,,\n2,12,1.25,,,\n"
    )

    assert read_curves(path) == {
        "loss": {"training": [(1.0, 2.5), (2.0, 1.5)], "validation": [(1.0, 2.25)]},
        "accuracy": {"validation": [(1.0, 0.25)]},
    }


def test_without_a_table_there_are_no_curves(tmp_path):
    assert read_curves(tmp_path / "metrics.csv") == {}


def test_trained_tensors_belong_to_sites_where_there_are_any():
    from peft_modal_pointcloud.backbone import PointMAEBackbone

    backbone = PointMAEBackbone(weights="random", dim=24, depth=1, num_heads=3, num_group=16, group_size=8)
    shapes = {
        "adapter.blocks.blocks.0.attn.qkv.q.down": (2, 24),
        "adapter.generator.edge.weight": (3, 4),
        "backbone.cls_token": (1, 1, 24),
        "head.0.weight": (5, 24),
        "adapter.scratch": (7,),
    }
    site = next(site for site in backbone.anatomy.sites if site.role == "attn.q")
    shapes = {name.replace("blocks.blocks.0.attn.qkv.q", site.name): shape for name, shape in shapes.items()}

    tensors = trained_tensors(shapes, backbone.anatomy, saved=set(shapes) - {"adapter.scratch"})

    assert [(t.part, t.site, t.role, t.name, t.count) for t in tensors] == [
        ("adapter", site.name, "attn.q", "down", 48),
        ("adapter", "generator.edge", "", "weight", 12),
        ("backbone tensors", "cls_token", "cls", "cls_token", 24),
        ("head", "0", "", "weight", 120),
        (TRAINING_ONLY, "scratch", "", "scratch", 7),
    ]
    section = parameters_section(tensors, total=1000)
    assert [row[:3] for row in section.blocks[0].rows] == [
        ("Adapter", 2, 60),
        ("Backbone tensors", 1, 24),
        ("Head", 1, 120),
        ("Training only", 1, 7),
    ]
    assert sum(row[3] for row in section.blocks[0].rows) == pytest.approx(1)


def test_where_nothing_is_trained_there_is_no_section():
    assert parameters_section([], total=10) is None


def test_the_renderer_of_a_modality_is_what_its_plugin_names():
    from peft_modal_pointcloud.render import render

    assert registry("peft_modal_pointcloud.render:render").renderer("smell") is render
    assert registry("peft_modal_pointcloud.render:render").renderer("sound") is None


@pytest.mark.parametrize(
    ("targets", "error", "sentence"),
    [
        (("peft_modal_pointcloud.render:paint",), RegistryError, "has no attribute 'paint'"),
        (("peft_modal.errors:__doc__",), RegistryError, "is no function"),
        (("a:b", "c:d"), RegistryError, "two renderers, of plugin 'p0' of distribution 'd0' and plugin 'p1'"),
        (("surely_not_installed.render:render",), MissingExtraError, "needs surely_not_installed, not installed"),
    ],
    ids=["attribute", "value", "two", "missing"],
)
def test_a_renderer_that_cannot_be_used_is_refused_in_a_sentence(targets, error, sentence):
    with pytest.raises(error, match=sentence):
        registry(*targets).renderer("smell")
