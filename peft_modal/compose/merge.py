"""Merging layers of configuration, and overrides from the command line.

Mappings merge key by key, everything else (lists too) is replaced. Where a node's identity changes, the whole node is
replaced, so that arguments of one class never reach another (the defaults that leak between classes in jsonargparse
and LightningCLI, jsonargparse#460). Identity is `name`, or `class_path` for Lightning's objects.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from peft_modal.errors import ConfigError
from peft_modal.registry import NOUNS

TOP_LEVEL: Final = (*NOUNS, "trainer", "seed")
"""The known top-level keys, in the order in which they are printed."""

Path = tuple[str, ...]


def merge(base: Mapping[str, Any], update: Mapping[str, Any], *, path: Path = ()) -> dict[str, Any]:
    """`update` laid over `base`; neither is changed, nothing is shared with the result.

    Args:
        base: The lower layer.
        update: The upper layer, wins.
        path: Keys above this mapping; inside `trainer` only `class_path` is an identity, since `name` is an ordinary
            argument of Lightning's loggers.
    """
    if path:
        identities = ("class_path",) if path[0] == "trainer" else ("name", "class_path")
        if any(key in base and key in update and base[key] != update[key] for key in identities):
            return dict(copy.deepcopy(update))
    result = dict(copy.deepcopy(base))
    for key, value in update.items():
        here = (*path, str(key))
        lower = _node(result.get(key), here)
        upper = _node(value, here)
        if isinstance(lower, Mapping) and isinstance(upper, Mapping):
            result[key] = merge(lower, upper, path=here)
        else:
            result[key] = copy.deepcopy(upper)
    return result


def merge_all(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Layers merged in order, the last wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        result = merge(result, layer)
    return result


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--a.b=value` and `--a.b value` of the known top-level keys from all other arguments.

    Returns:
        The other arguments, and the overrides, each as one `a.b=value`.

    Raises:
        ConfigError: An override has no value.
    """
    others: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key.partition(".")[0] not in TOP_LEVEL:
            others.append(argument)
        elif equals:
            overrides.append(argument.removeprefix("--"))
        else:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"--{key}: a value is missing; write --{key}=VALUE.")
            overrides.append(f"{key}={value}")
    return others, overrides


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """One layer out of overrides `a.b=value`, values being YAML.

    `method=ssf` means `method.name=ssf`. The order matters only where the same key is given twice: `method.rank=4
    method=lora` keeps the rank.

    Raises:
        ConfigError: Keys or values that cannot be read; all of them are reported.
    """
    from peft_modal.compose.yaml_text import parse_yaml  # here, so that `doctor` starts where PyYAML is missing

    layer: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(key.split("."))
        if not equals or not all(parts):
            problems.append(f"--{override}: expected --KEY=VALUE with a key such as method.rank.")
            continue
        try:
            value = parse_yaml(text, source=f"--{key}={text}")
        except ConfigError as error:
            problems.append(f"{error} Put the value in quotes to keep it as text: --{key}='\"{text}\"'.")
            continue
        for part in reversed(parts):
            value = {part: value}
        layer = merge(layer, value)
    if problems:
        raise ConfigError(*problems)
    return layer


def _node(value: object, path: Path) -> object:
    """`method: lora` is short for `method: {name: lora}`."""
    return {"name": value} if len(path) == 1 and path[0] in NOUNS and isinstance(value, str) else value
