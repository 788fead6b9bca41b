"""`--method.help NAME`: summary, paper, and every argument of a registered class."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Final

from peft_modal.cli.listing import list_noun
from peft_modal.cli.output import write, write_table
from peft_modal.compose.composed import runtime_args
from peft_modal.compose.describe import describe_type, parameters_of, show, type_hints
from peft_modal.compose.plain import plain
from peft_modal.registry import Noun, Registry

_COLUMNS: Final = ("argument", "type", "default", "meaning")


def print_node_help(registry: Registry, noun: Noun, name: str | None) -> None:
    """Print the help of one registered class, or the table of all of a noun."""
    if name is None:
        list_noun(registry, noun)
        return
    resolved = registry.resolve(noun, name, modality=None)
    cls = registry.load(resolved)
    text = inspect.getdoc(cls) or ""
    write(f"{noun} {registry.name_of(resolved, modality=None)} ({cls.__module__}.{cls.__qualname__})")
    write("\n" + (_description(text) or resolved.entry.summary))
    if resolved.entry.paper:
        write(f"\nPaper: {resolved.entry.paper}")
    rows = _argument_rows(cls)
    write("")
    write_table("arguments", _COLUMNS, rows)


def _argument_rows(cls: type) -> list[tuple[str, str, str, str]]:
    documented = _argument_docs(cls)
    hints = type_hints(cls)
    skipped = runtime_args(cls)
    rows = []
    for name, parameter in parameters_of(cls).items():
        if name not in skipped and parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            default = _default(cls, parameter)
            rows.append((name, describe_type(hints[name]), default, " ".join(documented.get(name, "").split())))
    return rows


def _default(cls: type, parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    value = parameter.default
    if dataclasses.is_dataclass(cls):
        field = next((field for field in dataclasses.fields(cls) if field.name == parameter.name), None)
        # A factory stands in the signature as a marker only.
        if field is not None and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
    try:
        return show(plain(value))
    except TypeError:
        return repr(value)


def _argument_docs(cls: type) -> Mapping[str, str]:
    """Texts from the `Args:` of the class, its constructor and its bases, and from the strings under attributes."""
    import docstring_parser

    texts = [text for base in cls.__mro__[:-1] for text in (base.__doc__, _constructor_doc(base)) if text]
    sources = [docstring_parser.parse(text) for text in texts]
    # A class whose source is not there has no texts under its attributes.
    with contextlib.suppress(OSError, TypeError):
        sources.append(docstring_parser.parse_from_object(cls))
    return {p.arg_name: p.description or "" for source in reversed(sources) for p in source.params}


def _constructor_doc(cls: type) -> str | None:
    constructor = vars(cls).get("__init__")
    return constructor.__doc__ if constructor is not None else None


def _description(text: str) -> str:
    """The docstring up to its first section."""
    lines = []
    for line in text.splitlines():
        if line.strip() in {"Args:", "Raises:", "Attributes:", "Yields:", "Returns:", "Example:", "Examples:"}:
            break
        lines.append(line)
    return "\n".join(lines).strip()
