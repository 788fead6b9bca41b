"""What the options of `compare` mean: methods with arguments, seeds, and the grid of learning rates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from peft_modal.compose.yaml_text import parse_yaml
from peft_modal.errors import ConfigError

_OPENING: Final = {"(": ")", "[": "]", "{": "}"}
_ITEM: Final = re.compile(r"(?P<name>[^()\s]+)\s*(?:\((?P<arguments>.*)\))?", flags=re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A method of the comparison, as it was typed."""

    label: str
    """What it is called in the table: `lora(rank=16)`."""
    node: dict[str, Any]
    """Its node of the configuration."""


def parse_methods(text: str) -> tuple[Item, ...]:
    """Methods out of `idpt,lora(rank=16),vpt(num_tokens=50)`; values are YAML.

    Raises:
        ConfigError: An item cannot be read, or two are the same.
    """
    items = tuple(_item(part) for part in _split(text, what="--methods") if part)
    if not items:
        raise ConfigError("--methods: name at least one method, such as --methods lora,full.")
    labels = [item.label for item in items]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"--methods: {', '.join(twice)} is named twice; name each once.")
    return items


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds out of a count (`3` is 0, 1, 2) or a list (`0,1,5`; `7,` is the seed 7 alone).

    Raises:
        ConfigError: It is neither, or a seed is out of range or twice there.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts if part) or not any(parts):
        raise ConfigError(f"--seeds: expected a count such as 3 or a list such as 0,1,5, got '{text}'.")
    numbers = tuple(int(part) for part in parts if part)
    if len(parts) == 1:
        if not 1 <= numbers[0] <= 1000:
            raise ConfigError(f"--seeds: a count goes from 1 to 1000, got {numbers[0]}; a list names seeds: 0,1,5.")
        return tuple(range(numbers[0]))
    if len(set(numbers)) < len(numbers) or max(numbers) >= 2**32:
        raise ConfigError(f"--seeds: expected different numbers below {2**32}, got '{text}'.")
    return numbers


def parse_grid(text: str) -> tuple[float, ...]:
    """Multipliers of the configuration's learning rate, in ascending order.

    Raises:
        ConfigError: One is no positive number, or twice there.
    """
    try:
        numbers = sorted(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"--lr-grid: expected different positive multipliers of task.lr, such as 0.3,1,3, got '{text}'."
        )
    return tuple(numbers)


def _item(text: str) -> Item:
    matched = _ITEM.fullmatch(text)
    if matched is None:
        raise ConfigError(f"--methods: '{text}' cannot be read; write NAME or NAME(argument=value, ...).")
    name, arguments = matched["name"], matched["arguments"]
    node: dict[str, Any] = {}
    shown = []
    for part in _split(arguments or "", what=f"--methods: {text}"):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier() or not value or key == "name" or key in node:
            raise ConfigError(
                f"--methods: '{part}' in '{text}' is no argument; write NAME(argument=value, ...), each argument once."
            )
        node[key] = parse_yaml(value, source=f"--methods: {text}")
        shown.append(f"{key}={value}")
    return Item(f"{name}({', '.join(shown)})" if shown else name, {"name": name, **node})


def _split(text: str, *, what: str) -> list[str]:
    """Pieces between the commas that stand outside of brackets.

    Raises:
        ConfigError: Brackets do not match.
    """
    pieces, open_brackets = [""], ""
    for letter in text:
        if letter in _OPENING:
            open_brackets += _OPENING[letter]
        elif letter in _OPENING.values():
            if not open_brackets.endswith(letter):
                raise ConfigError(f"{what}: '{letter}' closes nothing.")
            open_brackets = open_brackets[:-1]
        if letter == "," and not open_brackets:
            pieces.append("")
        else:
            pieces[-1] += letter
    if open_brackets:
        raise ConfigError(f"{what}: '{open_brackets[-1]}' is missing.")
    return [piece.strip() for piece in pieces] if text.strip() else []
