"""The selection language: three forms, block texts, and the sentence behind every mistake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_modal.anatomy import Selector
from peft_modal.errors import SelectionError


def blocks(value: object, depth: int) -> list[int]:
    chosen = Selector.parse({"blocks": value}).block_indices(depth, "blocks")
    assert chosen is not None
    return sorted(chosen)


def test_a_text_is_a_role() -> None:
    assert Selector.parse("attn.q") == Selector(roles=("attn.q",))


def test_a_list_is_a_list_of_roles() -> None:
    assert Selector.parse(["attn", "mlp"]) == Selector(roles=("attn", "mlp"))


def test_a_mapping_takes_single_values_and_lists() -> None:
    parsed = Selector.parse({"roles": "attn", "stacks": "visual", "blocks": 3, "path": r"\.q$"})
    assert parsed == Selector(roles=("attn",), stacks=("visual",), blocks=(3,), path=r"\.q$")
    assert Selector.parse({"roles": ["a", "b"], "stacks": ["c"]}) == Selector(roles=("a", "b"), stacks=("c",))


def test_a_selector_is_returned_as_it_is() -> None:
    selector = Selector(roles=("attn",))
    assert Selector.parse(selector) is selector


def test_a_role_matches_what_lies_below_it_up_to_a_dot() -> None:
    selector = Selector.parse("attn")
    assert selector.matches_role("attn")
    assert selector.matches_role("attn.q")
    assert not selector.matches_role("attention.q")
    assert not selector.matches_role("cross.attn")


def test_an_exact_role_matches_nothing_below_or_above() -> None:
    selector = Selector.parse("attn")
    assert not selector.matches_role("attn.qkv", exact=True)
    assert Selector.parse("attn.qkv").matches_role("attn.qkv", exact=True)
    assert not Selector().matches_role("attn.qkv", exact=True)


def test_a_stack_matches_what_lies_below_it() -> None:
    selector = Selector.parse({"stacks": "unet"})
    assert selector.matches_stack("unet.up")
    assert selector.matches_stack("unet")
    assert not selector.matches_stack("unets")


def test_a_path_is_searched_anywhere_in_the_name() -> None:
    selector = Selector.parse({"path": r"\.3\."})
    assert selector.matches_name("blocks.3.attn.q")
    assert not selector.matches_name("blocks.13.attn.q".replace(".13", ".1"))


@pytest.mark.parametrize(
    ("value", "depth", "expected"),
    [
        ("first: 2", 6, [0, 1]),
        ("last: 2", 6, [4, 5]),
        ({"last": 2}, 6, [4, 5]),
        ("last:9", 3, [0, 1, 2]),
        ("first: 0", 3, []),
        ("::2", 5, [0, 2, 4]),
        ("1:3", 5, [1, 2]),
        ("-2:", 5, [3, 4]),
        ("0.5:", 12, [6, 7, 8, 9, 10, 11]),
        (":0.25", 8, [0, 1]),
        ("0.25:0.75:2", 8, [2, 4]),
        ([0, -1], 4, [0, 3]),
        (2, 4, [2]),
        (-1, 4, [3]),
    ],
)
def test_block_texts_choose_the_blocks_they_name(value: object, depth: int, expected: list[int]) -> None:
    assert blocks(value, depth) == expected


def test_no_blocks_is_no_restriction() -> None:
    assert Selector.parse({"blocks": None}).block_indices(5, "blocks") is None


@given(count=st.integers(0, 40), depth=st.integers(1, 30))
def test_first_and_last_are_the_two_ends(count: int, depth: int) -> None:
    everything = list(range(depth))
    assert blocks(f"first: {count}", depth) == everything[:count]
    assert blocks(f"last: {count}", depth) == everything[max(depth - count, 0) :]


@given(
    start=st.none() | st.integers(-40, 40),
    stop=st.none() | st.integers(-40, 40),
    step=st.none() | st.integers(-5, 5).filter(bool),
    depth=st.integers(1, 30),
)
def test_a_slice_text_is_a_python_slice(start: int | None, stop: int | None, step: int | None, depth: int) -> None:
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    assert blocks(text, depth) == sorted(range(depth)[start:stop:step])


@given(share=st.floats(0, 1, allow_nan=False), depth=st.integers(1, 40))
def test_a_share_splits_the_stack_without_loss_or_overlap(share: float, depth: int) -> None:
    text = f"{share:.6f}"
    assert blocks(f":{text}", depth) + blocks(f"{text}:", depth) == list(range(depth))


@given(st.text(max_size=12))
def test_any_text_gives_blocks_of_the_stack_or_a_sentence(text: str) -> None:
    try:
        chosen = blocks(text, 7)
    except SelectionError:
        return
    assert set(chosen) <= set(range(7))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "a selection is a role, a list of roles or a mapping with"),
        (None, "a selection is a role, a list of roles or a mapping with"),
        ({"role": "attn"}, "a selection has no key 'role'; its keys are roles, blocks, stacks, path"),
        ({"roles": 5}, "roles: expected a name or a list of names, got 5"),
        ({"stacks": [1]}, "stacks: expected a name or a list of names, got [1]"),
        ({"path": 3}, "path: expected a regular expression, got 3"),
        ([1, 2], "roles: expected a name or a list of names, got [1, 2]"),
        ({"blocks": True}, "blocks: expected indices or a text such as 'last: 4', got True"),
        ({"blocks": [0, True]}, "blocks: expected indices"),
        ({"blocks": 1.5}, "blocks: expected indices or a text such as 'last: 4', '::2' or '0.5:', got 1.5"),
        ({"blocks": [0, "x"]}, "blocks: expected indices"),
        ({"blocks": {"first": 1, "last": 1}}, "blocks: expected indices"),
    ],
)
def test_a_malformed_selection_is_refused_with_what_was_expected(value: object, sentence: str) -> None:
    with pytest.raises(SelectionError) as caught:
        Selector.parse(value)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "last", "last: x", "middle: 2", "1:2:3:4", "0.x:", "::0", "::0.5", "nan.:", "1.e999:"]
)
def test_a_text_outside_the_language_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SelectionError, match=r"is none of 'first: 2', 'last: 4', '2:6', '::2', '0\.5:' or a list"):
        blocks(text, 4)


@pytest.mark.parametrize("index", [4, -5, 12])
def test_an_index_outside_the_stack_names_the_stack_and_its_size(index: int) -> None:
    with pytest.raises(SelectionError, match=rf"blocks: {index} is outside 0..3 \(stack 'blocks' has 4 blocks\)"):
        blocks([0, index], 4)


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(SelectionError, match=r"path: '\(' is not a regular expression"):
        Selector.parse({"path": "("}).matches_name("x")


def test_the_description_lists_only_what_is_set() -> None:
    assert Selector().describe() == "everything"
    assert Selector.parse({"roles": "attn", "blocks": "last: 2"}).describe() == "roles=('attn',), blocks='last: 2'"
