"""Parts that every run's report has, and the look-up of renderers."""

import pytest

from peft_modal.errors import MissingExtraError, RegistryError
from peft_modal.inspection.places import TrainedPlace, TrainedTensor
from peft_modal.registry import Plugin, Registry
from peft_modal.report import Chart
from peft_modal.running.parameters import parameters_section
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


def test_trained_parameters_are_counted_by_part_and_by_site():
    tensor = TrainedTensor("adapter.attn.q.down", (2, 24), 48)
    shift = TrainedTensor("backbone.cls_token", (1, 1, 24), 24)
    weight = TrainedTensor("head.0.weight", (5, 24), 120)
    scratch = TrainedTensor("training_only.scratch", (), 1)
    places = [
        TrainedPlace("adapter", "blocks", (0, 1), "attn.q", ("blocks.0.attn.q", "blocks.1.attn.q"), (tensor,)),
        TrainedPlace("backbone", "", (), "cls", ("cls_token",), (shift,)),
        TrainedPlace("head", "", (), "0", (), (weight,)),
        TrainedPlace("training_only", "", (), "scratch", (), (scratch,)),
    ]

    section = parameters_section(places, total=1000)

    assert [row[:3] for row in section.blocks[0].rows] == [
        ("Adapter", 1, 48),
        ("Backbone tensors", 1, 24),
        ("Head", 1, 120),
        ("Training only", 1, 1),
    ]
    assert sum(row[3] for row in section.blocks[0].rows) == pytest.approx(1)
    named = "down 2\N{MULTIPLICATION SIGN}24"
    assert section.blocks[1].rows == (("blocks.0.attn.q, blocks.1.attn.q", "attn.q", named, 48, 48 / 193),)
    assert section.blocks[4].rows == (("scratch", "scratch scalar", 1, 1 / 193),)


def test_where_the_parameters_lie_is_drawn_over_the_blocks():
    def place(role, block, count, group="adapter"):
        return TrainedPlace(
            group, "blocks", (block,), role, (f"blocks.{block}.{role}",), (TrainedTensor("a.b", (count,), count),)
        )

    shared = TrainedPlace("adapter", "blocks", (0, 1), "mlp", ("a", "b"), (TrainedTensor("a.c", (7,), 7),))
    places = [place("attn.q", 0, 40), place("attn.q", 0, 2), place("attn.q", 2, 5), place("norm", 1, 9, "backbone")]
    chosen = {"blocks.0.attn.q": 3, "blocks.2.attn.q": 11}

    section = parameters_section([*places, shared], total=1000, chosen=chosen)
    trained, entries = (block for block in section.blocks if isinstance(block, Chart))

    assert trained.data["rows"] == ["attn.q", "norm"]
    assert trained.data["columns"] == ["0", "1", "2"]
    assert trained.data["counts"] == [[42, None, 5], [None, 9, None]]
    assert entries.data["counts"] == [[3, None, 11]]
    without = parameters_section(places, total=1000)
    assert sum(isinstance(block, Chart) for block in without.blocks) == 1


def test_one_block_is_no_chart():
    tensor = TrainedTensor("a.b", (3,), 3)
    places = [TrainedPlace("adapter", "blocks", (1,), "attn.q", ("blocks.1.attn.q",), (tensor,))]
    assert not any(isinstance(block, Chart) for block in parameters_section(places, total=10).blocks)


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
