"""What plugins add to the command line: formats of `export` and flags of `predict`. Reads declarations only."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from peft_modal.errors import ConfigError
from peft_modal.registry import Flag, Registry

_WIDTH = 100
_INDENT = 22


def formats_text(registry: Registry) -> str:
    """The formats of `export`, for its help."""
    lines = [_entry(name, entry.summary) for name, entry in registry.formats().items()]
    return "\n".join(["formats:", *lines, "", ""])


def flags_text(registry: Registry) -> str:
    """The flags of `predict` by modality, for its help."""
    sections = []
    for modality, flags in registry.predict_flags().items():
        lines = [_entry(f"--{name} {flag.metavar}", flag.help) for name, flag in flags.items()]
        sections.append("\n".join([f"with adapters of modality '{modality}':", *lines, "", ""]))
    return "".join(sections)


def flag_names(registry: Registry) -> dict[str, Flag]:
    """Every flag of `predict`, whichever modality it belongs to."""
    return {name: flag for flags in registry.predict_flags().values() for name, flag in flags.items()}


def read_flags(given: Mapping[str, Sequence[str]], registry: Registry, modality: str) -> dict[str, Any]:
    """Values of flags as a modality declares them; a repeatable one as a tuple, the others as typed last.

    Args:
        given: What was typed, by flag.
        registry: Who declares what.
        modality: Of the adapter.

    Raises:
        ConfigError: A flag belongs to another modality, is given twice, or has a value of another type.
    """
    every = registry.predict_flags()
    declared = every.get(modality, {})
    problems, values = [], {}
    for name, texts in given.items():
        if name not in declared:
            owners = ", ".join(f"'{other}'" for other, flags in every.items() if name in flags)
            known = ", ".join(f"--{flag}" for flag in declared) or "none"
            problems.append(
                f"--{name}: it is for adapters of modality {owners}, and this one is of '{modality}', whose own flags "
                f"are: {known}"
            )
            continue
        flag = declared[name]
        if len(texts) > 1 and not flag.repeatable:
            problems.append(f"--{name}: given {len(texts)} times; give it once")
            continue
        try:
            found = tuple(_value(text, flag) for text in texts)
        except ValueError:
            problems.append(f"--{name}: '{texts[-1]}' is no {flag.type}")
            continue
        values[name] = found if flag.repeatable else found[-1]
    if problems:
        raise ConfigError(*problems)
    return values


def _value(text: str, flag: Flag) -> str | int | float:
    if flag.type == "integer":
        return int(text)
    return float(text) if flag.type == "number" else text


def _entry(name: str, text: str) -> str:
    """A name and its text beside it, as argparse sets them."""
    first = f"  {name:{_INDENT - 4}}  "
    lines = textwrap.wrap(text, _WIDTH - _INDENT) or [""]
    if len(first) > _INDENT:
        return "\n".join([first.rstrip(), *(" " * _INDENT + line for line in lines)])
    return "\n".join([first + lines[0], *(" " * _INDENT + line for line in lines[1:])])
