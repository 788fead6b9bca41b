"""One configuration from files and the command line: found by name, merged, checked, complete.

Precedence: defaults < files in order < command line. Choosing another `name` drops the old node's arguments. There is
no `${...}` interpolation. torch is imported only with the classes that a configuration names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_modal.compose.composed import Composed, Node
    from peft_modal.compose.composition import compose
    from peft_modal.compose.sources import ConfigFile, find_config, list_configs, read_config
    from peft_modal.compose.trainer import build_trainer_kwargs

__all__ = [
    "Composed",
    "ConfigFile",
    "Node",
    "build_trainer_kwargs",
    "compose",
    "find_config",
    "list_configs",
    "read_config",
]

_HOMES = {
    "Composed": "composed",
    "ConfigFile": "sources",
    "Node": "composed",
    "build_trainer_kwargs": "trainer",
    "compose": "composition",
    "find_config": "sources",
    "list_configs": "sources",
    "read_config": "sources",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562): `--help` and `list` need few of them.

    Raises:
        AttributeError: There is no such public name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'peft_modal.compose' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peft_modal.compose.{_HOMES[name]}"), name)
