"""YAML in and out: the safe subset of PyYAML without two of its traps.

PyYAML follows YAML 1.1, where `1e-3` is text, and takes the last of two equal keys in silence. Here exponents without
a dot are numbers, as people expect of a learning rate, and a repeated key is an error.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

from peft_modal.errors import ConfigError

_FLOAT_TAG: Final = "tag:yaml.org,2002:float"
_MERGE_TAG: Final = "tag:yaml.org,2002:merge"
_EXPONENT: Final = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that refuses a key written twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - PyYAML's own type
        node = super().compose_mapping_node(anchor)
        assert node is not None
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' stands here a second time", key.start_mark
                    )
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """`SafeDumper` that quotes what `_Loader` would read as a number, and writes no anchors."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, list("-+0123456789"))


def parse_yaml(text: str, *, source: str) -> Any:  # noqa: ANN401 - YAML holds anything
    """Read one YAML document.

    Args:
        text: The document.
        source: What to call it in an error: a file name, an option.

    Raises:
        ConfigError: It is not one well-formed YAML document.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        what = " ".join(part for part in (error.problem, error.context) if part)
        raise ConfigError(f"{source}{line}: not valid YAML: {what}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def format_yaml(value: object) -> str:
    """Write a value so that `parse_yaml` gives it back, keys in their order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
