"""Token layouts, and what a head may read."""

from __future__ import annotations

import pytest
import torch

from peft_modal.anatomy import Features, FeatureSpec, Segment, TokenLayout
from peft_modal.errors import ConfigError

LAYOUT = TokenLayout(
    segments=(Segment("cls", 1), Segment("registers", 4), Segment("patches", None), Segment("task", 2)),
    body="grid",
    prompt_index=5,
)


@pytest.mark.parametrize(
    ("name", "expected"), [("cls", (0, 1)), ("registers", (1, 5)), ("patches", (5, 21)), ("task", (21, 23))]
)
def test_a_segment_lies_where_the_counts_before_it_say(name: str, expected: tuple[int, int]) -> None:
    assert LAYOUT.slice(name, 23) == slice(*expected)


def test_the_slices_of_all_segments_tile_the_sequence() -> None:
    positions = list(range(30))
    tiled = [p for segment in LAYOUT.segments for p in positions[LAYOUT.slice(segment.name, 30)]]
    assert tiled == positions


def test_an_unknown_segment_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="dist"):
        LAYOUT.slice("dist", 23)


def test_the_body_is_the_segment_without_a_count() -> None:
    assert LAYOUT.body_name == "patches"


@pytest.mark.parametrize("counts", [(1, 2), (None, None), ()])
def test_a_layout_without_exactly_one_data_segment_is_refused(counts: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one segment without a count"):
        TokenLayout(segments=tuple(Segment(str(i), n) for i, n in enumerate(counts)), body="grid")


def test_extras_are_added_to_a_copy() -> None:
    features = Features(torch.zeros(2, 3, 4), LAYOUT, {"centres": torch.zeros(1)})
    more = features.with_extras({"prompt": torch.ones(1)})
    assert set(more.extras) == {"centres", "prompt"}
    assert set(features.extras) == {"centres"}
    assert more.tokens is features.tokens


def test_the_width_of_a_pool_counts_segments_statistics_and_exports() -> None:
    spec = FeatureSpec(width=10, layout=LAYOUT, exports={"prompt": 3})
    assert spec.pool_width(("cls", "max", "mean")) == 30
    assert spec.pool_width(("registers",)) == 40
    assert spec.pool_width(("prompt", "task")) == 30 + 20


def test_the_data_segment_has_no_fixed_width_and_cannot_be_pooled_by_name() -> None:
    with pytest.raises(ConfigError, match=r"head.pool: there is no feature 'patches' here"):
        FeatureSpec(width=10, layout=LAYOUT).pool_width(("patches",))


def test_an_unknown_feature_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'prompt'"):
        FeatureSpec(width=10, layout=LAYOUT, exports={"prompt": 1}).pool_width(("promt",))


def test_without_a_layout_only_statistics_and_exports_are_there() -> None:
    spec = FeatureSpec(width=10, layout=None, exports={"side": 2})
    assert spec.available() == {"max": 10, "mean": 10, "side": 20}
