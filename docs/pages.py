"""Pages that the registry writes, one for each thing that a configuration names, and the interface for authors."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from peft_modal.compose.describe import describe_type, parameters_of, show, type_hints
from peft_modal.registry import Listed, Registry
from peft_modal.testing.matrix import MatrixRow, load_entry, matrix_table, method_matrix

ROOT: Final = Path(__file__).parent.parent
NOUNS: Final = {"method": "Methods", "backbone": "Backbones", "head": "Heads", "task": "Tasks", "data": "Data"}
INTERFACE: Final = (
    "peft_modal.anatomy", "peft_modal.attach", "peft_modal.methods.base", "peft_modal.registry", "peft_modal.report",
    "peft_modal.testing",
)  # fmt: skip
"""Modules whose public names plugin authors use."""
_CORE: Final = "any modality"
_SECTION: Final = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.M)


def write_pages(folder: Path, registry: Registry) -> None:
    """Write all pages into an empty or absent folder.

    Args:
        folder: Of generated pages.
        registry: What is installed.
    """
    matrix = method_matrix(registry)
    pages = {f"{noun}.md": overview(noun, registry, matrix) for noun in NOUNS}
    for listed in _usable(registry):
        pages[f"{slug(listed)}.md"] = page(listed, load_entry(registry, listed), matrix)
    pages["interface.md"] = interface()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def slug(listed: Listed) -> str:
    """Where the page of an object lies."""
    return f"{listed.noun}/{listed.modality or 'core'}_{listed.name}"


def overview(noun: str, registry: Registry, matrix: list[MatrixRow]) -> str:
    """All objects of a kind, each with its line in `list`."""
    rows = ["| name | modality | what it is |", "|---|---|---|"]
    links = []
    for listed in _usable(registry):
        if listed.noun == noun:
            summary = escape(listed.entry.summary)
            rows.append(f"| [{listed.name}]({slug(listed)}.md) | {listed.modality or _CORE} | {summary} |")
            links.append(slug(listed))
    parts = [f"# {NOUNS[noun]}", "\n".join(rows)]
    if noun == "method":
        parts += ["## Which method works on which backbone", matrix_table(matrix)]
    parts.append("\n".join(["```{toctree}", ":hidden:", *links, "```"]))
    return "\n\n".join(parts) + "\n"


def page(listed: Listed, cls: type, matrix: list[MatrixRow]) -> str:
    """What an object's docstring says, its arguments with types and defaults, where it works and what it costs."""
    name = f"{listed.modality}.{listed.name}" if listed.modality else listed.name
    parts = [f"# {listed.name}", body(cls)]
    if listed.entry.paper:
        parts.append(f"Source: {escape(listed.entry.paper)}.")
    if table := arguments_table(cls):
        parts += ["## Arguments", table]
    if listed.noun == "method":
        parts += _of_a_method(name, listed, matrix)
    parts.append(f"`{cls.__module__}.{cls.__qualname__}`, of the plugin `{listed.plugin}`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_a_method(name: str, listed: Listed, matrix: list[MatrixRow]) -> Iterator[str]:
    works = [row.backbone for row in matrix if row.method == name and row.works]
    refused = [row for row in matrix if row.method == name and not row.works and "of modality" not in row.reason]
    lines = [f"Works on {', '.join(f'`{backbone}`' for backbone in works) or 'no registered backbone'}."]
    lines += [f"- Not on `{row.backbone}`: {escape(row.reason)}." for row in refused]
    yield "## Where it works"
    yield "\n".join([lines[0], "", *lines[1:]])
    if costs := list(_costs(listed.name)):
        yield "## What a step costs"
        yield "\n".join([
            "Over full fine-tuning, from `python benchmarks/step_cost.py`.", "",
            "| network, device | time | memory | trained |", "|---|---:|---:|---:|", *costs,
        ])  # fmt: skip


def _costs(method: str) -> Iterator[str]:
    results = json.loads((ROOT / "benchmarks/results/step_cost.json").read_text(encoding="utf-8"))
    for device, found in results.items():
        for network, rows in found["backbones"].items():
            row = rows.get(method, {})
            if "ratio" in row:
                memory = f"{row['peak_ratio']:.2f}" if "peak_ratio" in row else ""
                yield f"| {network}, {device} | {row['ratio']:.2f} | {memory} | {row['trained']:,.0f} |"


def interface() -> str:
    """Public names of the modules that plugin authors use, with their docstrings."""
    parts = ["# Interface for authors"]
    for module_name in INTERFACE:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module_name
        ]  # fmt: skip
        parts += [f"## `{module_name}`", body(module)]
        for name in sorted(names):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                parts += [f"### `{name}`", body(value)]
                parts += [_members(value)] if inspect.isclass(value) else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _members(cls: type) -> str:
    """First sentences of a class's own public methods, as a table; empty where it has none."""
    rows = []
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        function = function.fget if isinstance(function, property) else function
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            rows.append(f"| `{name}` | {cell(inspect.cleandoc(function.__doc__).split(chr(10) * 2)[0])} |")
    return "\n".join(["| member | |", "|---|---|", *rows]) if rows else ""


def arguments_table(cls: type) -> str:
    """Arguments that a configuration may give, with what the docstring says of each."""
    told = told_arguments(cls)
    hints = type_hints(cls)
    rows = [
        f"| `{name}` | {cell(describe_type(hints[name]))} | {_default(parameter)} | {cell(told[name])} |"
        for name, parameter in parameters_of(cls).items()
        if name in told and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return "\n".join(["| argument | takes | default | |", "|---|---|---|---|", *rows]) if rows else ""


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f"`{cell(show(parameter.default), plain=True)}`"


def told_arguments(cls: type) -> Mapping[str, str]:
    """What the docstrings of a class and its bases say of their arguments."""
    told: dict[str, str] = {}
    for base in cls.__mro__:
        sections = dict(_sections(base))
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", sections.get("Args", ""), re.M):
            told.setdefault(name, " ".join(text.split()))
    return told


def body(value: Any) -> str:  # noqa: ANN401 — a class, a function or a module
    """A docstring as Markdown: its text, then what it raises."""
    parts = []
    for title, text in _sections(value):
        if not title:
            parts.append(escape(text))
        elif title in {"Raises", "Returns"} or (title == "Args" and inspect.isfunction(value)):
            items = re.sub(r"\n {8,}", " ", inspect.cleandoc(text))
            lines = [f"- {escape(line)}" for line in items.splitlines() if line.strip()]
            parts.append("\n".join([f"**{title}**", "", *lines]))
    return "\n\n".join(parts)


def _sections(value: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 — a class, a function or a module
    text = inspect.cleandoc(vars(value).get("__doc__") or "") if hasattr(value, "__dict__") else ""
    pieces = _SECTION.split(text)
    yield "", pieces[0].strip()
    for title, content in zip(pieces[1::2], pieces[2::2], strict=True):
        yield title, content.strip("\n")


def escape(text: str) -> str:
    """Text of a docstring for Markdown: formulas keep their stars, bars and brackets; code stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]|$#~])", r"\\\1", part) for part in parts
    )  # fmt: skip


def cell(text: str, *, plain: bool = False) -> str:
    """Text for a cell of a table; with `plain` for code in it."""
    text = " ".join(text.split())
    return text.replace("|", "\\|") if plain else re.sub(r"(`[^`]*)\|([^`]*`)", r"\1\\|\2", escape(text))


def _usable(registry: Registry) -> list[Listed]:
    return [listed for listed in registry.entries() if listed.noun in NOUNS and listed.state == "ok"]
