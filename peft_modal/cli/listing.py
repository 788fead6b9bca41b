"""`list`: what is installed, where it comes from, and whether it can be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from peft_modal.cli.options import KINDS, Options
from peft_modal.cli.output import write_json, write_table
from peft_modal.compose.sources import broken_config_packages, list_configs
from peft_modal.registry import CORE, Noun, Registry, default_registry

_NOUN_OF: Final[dict[str, Noun]] = {
    "methods": "method",
    "heads": "head",
    "backbones": "backbone",
    "tasks": "task",
    "data": "data",
}
_COLUMNS: Final = ("name", "modality", "distribution", "state", "summary", "paper")


@dataclass(frozen=True)
class _Row:
    name: str
    modality: str
    distribution: str
    state: str
    summary: str = ""
    paper: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.name, self.modality, self.distribution, self.state, self.summary, self.paper)


def list_verb(options: Options) -> int:
    """`list`, and `list --matrix`, which imports torch."""
    if options.matrix:
        from peft_modal.cli.matrix import list_matrix

        list_matrix(default_registry(), as_json=options.json)
    else:
        list_installed(default_registry(), kind=options.kind, as_json=options.json)
    return 0


def list_installed(registry: Registry, *, kind: str | None, as_json: bool) -> None:
    """Print the tables of all kinds, or of one."""
    tables = {name: _rows(registry, name) for name in KINDS if kind in {None, name}}
    if as_json:
        write_json(
            {name: [dict(zip(_COLUMNS, row.cells, strict=True)) for row in rows] for name, rows in tables.items()}
        )
        return
    for name, rows in tables.items():
        write_table(name, _COLUMNS, [row.cells for row in rows])


def list_noun(registry: Registry, noun: Noun) -> None:
    """Print the table of one noun."""
    kind = next(kind for kind, own in _NOUN_OF.items() if own == noun)
    list_installed(registry, kind=kind, as_json=False)


def _rows(registry: Registry, kind: str) -> Sequence[_Row]:
    if kind == "modalities":
        return _plugin_rows(registry)
    if kind == "configs":
        shipped = [_Row(file.name, "", file.origin, "ok", file.summary) for file in list_configs(registry)]
        broken = broken_config_packages(registry)
        return shipped + [_Row(package, "", origin, f"broken: {reason}") for package, origin, reason in broken]
    return [
        _Row(e.name, e.modality or CORE, e.distribution, e.state, e.entry.summary, e.entry.paper)
        for e in registry.entries(_NOUN_OF[kind])
    ]


def _plugin_rows(registry: Registry) -> list[_Row]:
    """Plugins, since a modality is nothing else; the core's own and the shared heads belong to all."""
    rows = []
    for source in registry.installed:
        counts = {kind: len(source.plugin.entries(noun)) for kind, noun in _NOUN_OF.items()}
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        modality = source.plugin.namespace or CORE
        rows.append(_Row(source.plugin.name, modality, source.distribution, source.state, summary))
    rows.extend(
        _Row(broken.name, "", broken.distribution, f"broken: {broken.reason}", broken.module)
        for broken in registry.broken
    )
    return rows
