"""What can be written in --methods, --seeds and --lr-grid."""

import pytest

from peft_modal.comparison.items import parse_grid, parse_methods, parse_seeds
from peft_modal.errors import ConfigError


def test_methods_are_named_with_arguments_in_yaml():
    items = parse_methods("idpt, lora(rank=16, sites=[attn.q, mlp]) ,compose(methods=[{name: lora}, {name: bitfit}])")

    assert [item.label for item in items] == [
        "idpt",
        "lora(rank=16, sites=[attn.q, mlp])",
        "compose(methods=[{name: lora}, {name: bitfit}])",
    ]
    assert items[1].node == {"name": "lora", "rank": 16, "sites": ["attn.q", "mlp"]}
    assert items[2].node["methods"] == [{"name": "lora"}, {"name": "bitfit"}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "at least one method"),
        ("lora,lora", "named twice"),
        ("lora(rank=4),lora( rank = 4 )", "named twice"),
        ("lora(rank=4", "'\\)' is missing"),
        ("lora)", "closes nothing"),
        ("lora(rank)", "'rank' in 'lora\\(rank\\)' is no argument"),
        ("lora(rank=1, rank=2)", "each argument once"),
        ("lora(name=full)", "is no argument"),
        ("lo ra", "cannot be read"),
        ("lora(rank=[1)", "closes nothing"),
    ],
)
def test_a_list_of_methods_that_cannot_be_read_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_methods(text)


@pytest.mark.parametrize(("text", "seeds"), [("3", (0, 1, 2)), ("0,1,5", (0, 1, 5)), ("7,", (7,))])
def test_seeds_are_a_count_or_a_list(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "", ",", "-1", "1.5", "1,1", "two", "4294967296,", "1001"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_the_grid_is_sorted():
    assert parse_grid("3,0.3,1") == (0.3, 1, 3)


@pytest.mark.parametrize("text", ["", "0", "-1,1", "1,1.0", "a", "nan", "inf"])
def test_other_grids_are_refused(text):
    with pytest.raises(ConfigError, match="--lr-grid"):
        parse_grid(text)
