"""Ranges of numbers, and constructors of methods that keep to theirs whoever calls them."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import pytest

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.compose.describe import type_hints
from peft_modal.errors import ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal.ranges import DropRate, PositiveInt, Range, outside
from peft_modal.registry import NOUNS, default_registry


@pytest.mark.parametrize(
    ("limits", "inside", "beyond", "words"),
    [
        (Range(0, 1), [0, 0.5, 1], [-1e-9, 1.0001], "from 0 to 1"),
        (Range(0, 1, is_below=True), [0, 0.999], [-1e-9, 1, 1.5], "from 0 to below 1"),
        (Range(0, 1, is_open=True), [1e-9, 1], [0, 1.1], "above 0, at most 1"),
        (Range(0, 1, is_open=True, is_below=True), [0.5], [0, 1], "above 0, below 1"),
        (Range(1), [1, 10**9], [0, float("inf"), float("nan")], "of at least 1"),
        (Range(0, is_open=True), [0.1], [0, -1], "above 0"),
    ],
)
def test_a_range_says_what_is_in_it(limits: Range, inside: list[float], beyond: list[float], words: str) -> None:
    assert all(number in limits for number in inside)
    assert not any(number in limits for number in beyond)
    assert str(limits) == words


def test_every_number_of_a_list_is_looked_at() -> None:
    assert outside([0.1, 1.0], list[DropRate]) == Range(0, 1, is_below=True)
    assert outside([0.1, 0.9], list[DropRate]) is None
    assert outside(None, DropRate | None) is None
    assert outside(True, PositiveInt) is None


class Ranged(Method):
    """One of a third party."""

    identity_at_init = True

    def __init__(self, *, width: PositiveInt = 4, dropout: DropRate | None = None, free: float = 0.0) -> None:
        self.given = (width, dropout, free)

    def build(self, adapter: Adapter) -> None:
        """Nothing."""


class Further(Ranged):
    """Its base's arguments, and one more."""

    def __init__(self, *, shares: list[Annotated[float, Range(0, 1)]], **options: Any) -> None:
        super().__init__(**options)
        self.shares = shares


def test_a_method_made_in_python_refuses_what_a_configuration_would() -> None:
    assert Ranged(width=3, dropout=0.5, free=-7.0).given == (3, 0.5, -7.0)
    with pytest.raises(ConfigError) as caught:
        Ranged(width=0, dropout=1.0)
    assert caught.value.problems == (
        "method.width: expected a number of at least 1, got 0",
        "method.dropout: expected a number from 0 to below 1, got 1.0",
    )
    with pytest.raises(ConfigError, match=r"method\.shares: expected a number from 0 to 1, got \[0, 2\]"):
        Further(shares=[0, 2])
    with pytest.raises(ConfigError, match=r"method\.dropout"):
        Further(shares=[0], dropout=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        Ranged(widht=3)  # type: ignore[call-arg]


def test_a_checked_constructor_still_shows_its_own_signature() -> None:
    assert list(inspect.signature(LoRA).parameters)[:2] == ["sites", "rank"]
    assert LoRA.__init__.__qualname__ == "LoRA.__init__"
    assert isinstance(LoRA(rank=2).sites, Selector)


def drop_rates() -> list[object]:
    registry = default_registry()
    found = []
    for noun in NOUNS:
        for entry in registry.entries(noun):
            full = f"{entry.modality}.{entry.name}" if entry.modality else entry.name
            cls = registry.load(registry.resolve(noun, full, modality=None))
            names = [n for n in type_hints(cls) if n.endswith(("dropout", "drop_path")) and n != "caption_dropout"]
            found += [pytest.param(cls, name, id=f"{noun}-{full}-{name}") for name in names]
    return found


@pytest.mark.parametrize(("cls", "name"), drop_rates())
def test_nothing_can_be_dropped_always(cls: type, name: str) -> None:
    assert outside(1.0, type_hints(cls)[name]) == Range(0, 1, is_below=True)
