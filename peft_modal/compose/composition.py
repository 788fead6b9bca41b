"""From names of configurations and overrides to one checked configuration."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from peft_modal.compose.composed import Composed
from peft_modal.compose.merge import merge_all, parse_overrides
from peft_modal.compose.sources import find_config, read_config
from peft_modal.compose.validate import Layer, validate
from peft_modal.errors import ConfigError
from peft_modal.registry import Noun, Registry, default_registry

_REQUIRED: Final[tuple[Noun, ...]] = ("backbone", "method", "task", "data")


def compose(
    *configs: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    required: Collection[Noun] = _REQUIRED,
) -> Composed:
    """Compose a configuration: defaults < `configs` in order < `overrides`.

    Args:
        configs: Names or paths of YAML files, or mappings such as the configuration inside an adapter file.
        overrides: `method.rank=4`, `method=lora`; values are YAML.
        registry: Where names are looked up; None for everything installed.
        required: Nouns that must be present. A head is required by the task.

    Raises:
        ConfigError: Lists every mistake of every node, or the file that cannot be read.
    """
    registry = registry or default_registry()
    layers: list[Layer] = []
    for config in configs:
        if isinstance(config, Mapping):
            layers.append(Layer("", copy.deepcopy(config)))
        else:
            found = find_config(config, registry)
            layers.append(Layer(f"in {found.name}", read_config(found)))
    if overrides:
        layers.append(Layer("on the command line", parse_overrides(overrides)))
    if not layers:
        raise ConfigError("nothing to compose: name a configuration with --config NAME, or give --backbone=NAME etc.")
    merged = merge_all(layer.values for layer in layers)
    return validate(merged, layers=layers, registry=registry, required=required)
