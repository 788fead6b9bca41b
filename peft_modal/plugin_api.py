"""What a plugin declares about itself: names, and where the things behind them live.

A plugin's `plugin.py` imports this (through `peft_modal.registry`) and nothing heavy: `list` and `--help` read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from peft_modal.extras import install_command, missing_packages

Noun = Literal["backbone", "method", "head", "task", "data"]
NOUNS: Final[tuple[Noun, ...]] = get_args(Noun)
"""In the order in which configurations are printed."""

PLUGIN_API: Final = 1
"""Version of the plugin interface that this core understands."""

CORE: Final = "core"
"""How the modality-free part is written in a full name: `core.lora`."""


@dataclass(frozen=True)
class Entry:
    """One registered object, named by text so that nothing is imported before it is used."""

    target: str
    """Where it lives: `package.module:Object`."""
    summary: str = ""
    """One line for `list` and the help."""
    paper: str = ""
    """Source: authors, year, and where to find it."""
    requires: tuple[str, ...] = ()
    """Import names of optional packages without which this entry cannot work."""


FlagType = Literal["text", "integer", "number"]


@dataclass(frozen=True)
class Flag:
    """An option of `predict` that a modality adds."""

    help: str
    """What it is for; one line."""
    metavar: str = "VALUE"
    """What stands for its value in the help."""
    type: FlagType = "text"
    """What its value is read as."""
    repeatable: bool = False
    """Whether it may be given several times: the task gets a tuple of all values."""


RESERVED_FLAGS: Final = frozenset(
    {"adapter", "input", "out", "alpha", "json", "help", "config", "trainer", "seed", *NOUNS}
)
"""What `predict` calls its own options, and what stands for parts of a configuration."""


@dataclass(frozen=True)
class Plugin:
    """What a light `plugin.py` declares: names and where they live, without importing any of it."""

    name: str
    api: int = PLUGIN_API
    """Version of this interface that the plugin was written for."""
    modality: str | None = None
    """Modality that its entries belong to; None: the plugin's own name; "": all of them."""
    extra: str = ""
    """Extra of the plugin's distribution that brings its optional packages."""
    requires: tuple[str, ...] = ()
    """Import names that the extra brings; an entry that cannot work without one names it in its own `requires`."""
    backbones: Mapping[str, Entry] = field(default_factory=dict)
    methods: Mapping[str, Entry] = field(default_factory=dict)
    heads: Mapping[str, Entry] = field(default_factory=dict)
    tasks: Mapping[str, Entry] = field(default_factory=dict)
    data: Mapping[str, Entry] = field(default_factory=dict)
    configs: tuple[str, ...] = ()
    """Packages that hold ready-to-run YAML files."""
    renderer: str = ""
    """`package.module:function` that draws one sample of the modality in reports: `peft_modal.report.Renderer`."""
    exporters: Mapping[str, Entry] = field(default_factory=dict)
    """Formats of `export` by name: functions that take a `peft_modal.api.Model` and a path, write there, and return a
    `peft_modal.api.Exported`."""
    importer: str = ""
    """`package.module:function` that reads another program's LoRA file for `import`: it takes the path and a backbone
    without weights, and returns a `peft_modal.hf.files.LoraFolder`."""
    predict_flags: Mapping[str, Flag] = field(default_factory=dict)
    """Options of `predict` by name, without dashes; a task reads them in `predict_with`."""

    @property
    def namespace(self) -> str:
        """The modality under which the entries are registered, "" for all."""
        return self.name if self.modality is None else self.modality

    def entries(self, noun: Noun) -> Mapping[str, Entry]:
        """The entries of one noun, by name."""
        by_noun: dict[Noun, Mapping[str, Entry]] = {
            "backbone": self.backbones,
            "method": self.methods,
            "head": self.heads,
            "task": self.tasks,
            "data": self.data,
        }
        return by_noun[noun]


@dataclass(frozen=True)
class Installed:
    """A usable plugin and where it comes from."""

    plugin: Plugin
    distribution: str
    module: str = ""

    @property
    def state(self) -> str:
        """`ok`, or the command that installs what the extra brings."""
        missing = missing_packages(self.plugin.requires)
        return f"missing extra: {self.install_command(missing)}" if missing else "ok"

    @property
    def packages(self) -> frozenset[str]:
        """Top-level import packages that belong to the plugin."""
        if self.module:
            return frozenset({root_package(self.module)})
        return frozenset(root_package(entry.target) for noun in NOUNS for entry in self.plugin.entries(noun).values())

    def install_command(self, import_names: Iterable[str]) -> str:
        """The command that brings `import_names`."""
        return install_command(import_names, extra=self.plugin.extra, distribution=self.distribution)


@dataclass(frozen=True)
class Broken:
    """A plugin that cannot be used, and why; it takes nothing else down."""

    name: str
    distribution: str
    module: str
    reason: str


def root_package(path: str) -> str:
    """The top-level package of `package.module:Object` or `package.module.Object`."""
    return path.partition(":")[0].partition(".")[0]


def fault_of(plugin: object) -> str:
    """What is wrong with the object behind an entry point, "" if nothing is."""
    if not isinstance(plugin, Plugin):
        return f"{plugin!r} is no peft_modal.registry.Plugin"
    if plugin.api != PLUGIN_API:
        advice = "upgrade peft-modal" if plugin.api > PLUGIN_API else "upgrade the plugin"
        return f"it is written for plugin API {plugin.api}, this peft_modal supports {PLUGIN_API}: {advice}"
    if plugin.namespace == CORE:
        return f"the modality name '{CORE}' is reserved"
    if isinstance(plugin.configs, str) or not all(isinstance(name, str) for name in plugin.configs):
        return f"its configs {plugin.configs!r} are no tuple of package names"
    for what, target in (("renderer", plugin.renderer), ("importer", plugin.importer)):
        if target and target.count(":") != 1:
            return f"its {what} '{target}' is not written 'package.module:function'"
    return next(_entry_faults(plugin), "") or next(_flag_faults(plugin), "")


def _entry_faults(plugin: Plugin) -> Iterator[str]:
    named: list[tuple[str, Mapping[str, Entry]]] = [(noun, plugin.entries(noun)) for noun in NOUNS]
    for kind, entries in (*named, ("export format", plugin.exporters)):
        for name, entry in entries.items():
            if not name.isidentifier():
                yield f"{kind} name '{name}' is not made of letters, digits and underscores"
            if not isinstance(entry, Entry) or entry.target.count(":") != 1:
                yield f"{kind} '{name}' is not an Entry with a target 'package.module:Object'"


def _flag_faults(plugin: Plugin) -> Iterator[str]:
    for name, flag in plugin.predict_flags.items():
        if not re.fullmatch("[a-z][a-z0-9-]*", name):
            yield f"predict flag '{name}' is not made of small letters, digits and dashes"
        if name in RESERVED_FLAGS:
            yield f"predict flag '{name}' is the program's own"
        if not isinstance(flag, Flag) or flag.type not in get_args(FlagType):
            yield f"predict flag '{name}' is not a Flag of type {', '.join(get_args(FlagType))}"
