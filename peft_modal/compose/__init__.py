"""One configuration from files and the command line: found by name, merged, checked, complete.

Precedence: defaults < files in order < command line. Choosing another `name` drops the old node's arguments. There is
no `${...}` interpolation. torch is imported only with the classes that a configuration names.
"""

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
