"""Plugins and the names they register: looked up lazily, isolated from each other, never imported before use.

A key is (noun, modality, name). The core's own entries, and those of plugins with `modality=""`, belong to every
modality. This module needs the standard library only, so that `list` and `--help` stay fast.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from peft_modal.errors import MissingExtraError, PeftModalError, RegistryError, nearest
from peft_modal.extras import absent_package, install_command, missing_packages, require
from peft_modal.plugin_api import (
    CORE,
    NOUNS,
    PLUGIN_API,
    Broken,
    Entry,
    Flag,
    Installed,
    Noun,
    Plugin,
    fault_of,
    root_package,
)

__all__ = [
    "CORE",
    "NOUNS",
    "PLUGIN_API",
    "Broken",
    "Entry",
    "Flag",
    "Installed",
    "Listed",
    "Noun",
    "Plugin",
    "Registry",
    "Resolved",
    "default_registry",
    "require",
]

_GROUPS: Final = ("modalities", "methods", "heads", "backbones")
Key = tuple[Noun, str, str]


@dataclass(frozen=True)
class Resolved:
    """The outcome of a look-up; nothing has been imported yet."""

    entry: Entry
    noun: Noun
    modality: str
    name: str
    distribution: str
    source: Installed | None = None
    """The plugin that registered it; None for an import path."""


@dataclass(frozen=True)
class Listed:
    """One line of `list`."""

    noun: Noun
    modality: str
    name: str
    entry: Entry
    plugin: str
    distribution: str
    state: str
    """`ok`, `missing extra: <command>` or `broken: <reason>`."""


class Registry:
    """All names of all installed plugins."""

    def __init__(
        self,
        installed: Iterable[Installed],
        *,
        broken: Iterable[Broken] = (),
        config_packages: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.installed: tuple[Installed, ...] = tuple(installed)
        self.broken: tuple[Broken, ...] = tuple(broken)
        self._offers: dict[Key, list[Resolved]] = {}
        self._names: dict[type, Resolved] = {}
        for source in self.installed:
            plugin = source.plugin
            for noun in NOUNS:
                for name, entry in plugin.entries(noun).items():
                    offer = Resolved(entry, noun, plugin.namespace, name, source.distribution, source)
                    self._offers.setdefault((noun, plugin.namespace, name), []).append(offer)
        own = ((package, source.distribution) for source in self.installed for package in source.plugin.configs)
        self.config_packages: tuple[tuple[str, str], ...] = tuple(dict.fromkeys([*own, *config_packages]))
        """Packages with YAML files and the distributions they come from."""

    @classmethod
    def discover(cls) -> Registry:
        """Read the entry points of every installed distribution; importing stops at the light plugin modules."""
        from importlib.metadata import entry_points  # 40 ms that `--help` does not need

        installed: list[Installed] = []
        broken: list[Broken] = []
        seen: set[tuple[str, str]] = set()
        for group in _GROUPS:
            for point in entry_points(group=f"peft_modal.{group}"):
                distribution = point.dist.name if point.dist else "unknown"
                # One plugin may stand in several groups.
                if (point.value, distribution) in seen:
                    continue
                seen.add((point.value, distribution))
                module = point.value.partition(":")[0]
                try:
                    plugin = point.load()
                    fault = fault_of(plugin)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: kept and shown by `list`
                    fault = _cause(error)
                if fault:
                    broken.append(Broken(point.name, distribution, module, fault))
                else:
                    installed.append(Installed(plugin, distribution, module))
        packages = [
            (point.value, point.dist.name if point.dist else "unknown")
            for point in entry_points(group="peft_modal.configs")
        ]
        return cls(installed, broken=broken, config_packages=packages)

    @classmethod
    def from_plugins(cls, plugins: Iterable[tuple[object, str]], *, broken: Iterable[Broken] = ()) -> Registry:
        """A registry of exactly these (plugin, distribution) pairs, with the checks of `discover`."""
        installed: list[Installed] = []
        faulty = list(broken)
        for plugin, distribution in plugins:
            fault = fault_of(plugin)
            if isinstance(plugin, Plugin) and not fault:
                installed.append(Installed(plugin, distribution))
            else:
                name = getattr(plugin, "name", type(plugin).__name__)
                faulty.append(Broken(str(name), distribution, "", fault))
        return cls(installed, broken=faulty)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The registered modalities, sorted, without the core."""
        return tuple(sorted({source.plugin.namespace for source in self.installed} - {""}))

    @property
    def packages(self) -> frozenset[str]:
        """Top-level packages that a configuration may import from: ours and those of the plugins."""
        return frozenset({"peft_modal"}).union(*(source.packages for source in self.installed))

    def allows(self, path: str) -> bool:
        """Whether a configuration may name the import path `path`."""
        root = root_package(path)
        return root.startswith("peft_modal_") or root in self.packages

    def resolve(self, noun: Noun, name: str, *, modality: str | None) -> Resolved:
        """Find what `name` stands for.

        Args:
            noun: Kind of the thing looked for.
            name: Short name, full name (`pointcloud.folder`, `core.lora`) or import path (`package.module:Object`).
            modality: Where a short name is looked up before the core; None: the core, then the only one that has it.

        Raises:
            RegistryError: The name is unknown, ambiguous, registered twice, or a path of a package not allowed.
        """
        first, _, rest = name.partition(".")
        if ":" not in name and first in {CORE, *self.modalities} and rest:
            key: Key = (noun, "" if first == CORE else first, rest)
            if key in self._offers:
                return self._single(key)
        elif ":" in name or (rest and self.allows(name)):
            return self._from_path(noun, name)
        else:
            for key in self._short_keys(noun, name, modality):
                return self._single(key)
        raise RegistryError(self._unknown(noun, name, modality))

    def load(self, resolved: Resolved) -> type:
        """Import the class behind a look-up.

        Raises:
            MissingExtraError: An optional package is not installed.
            RegistryError: The import fails for another reason, or the target is not a class.
        """
        source = resolved.source
        label = f"{resolved.noun} '{resolved.name}'"
        if source and (missing := missing_packages(resolved.entry.requires)):
            raise MissingExtraError(
                f"{label} needs {', '.join(missing)}, not installed; run: {source.install_command(missing)}"
            )
        found = self._import(resolved.entry.target, label, source)
        if not isinstance(found, type):
            raise RegistryError(f"{label} cannot be used: '{resolved.entry.target}' is {found!r}, not a class.")
        self._names.setdefault(found, resolved)
        return found

    def renderer(self, modality: str) -> Callable[..., Any] | None:
        """Import what draws samples of a modality (`peft_modal.report.Renderer`), None where no plugin names one.

        Raises:
            MissingExtraError: An optional package is not installed.
            RegistryError: Two plugins name one, its import fails, or it cannot be called.
        """
        return self._function(modality, "renderer", lambda plugin: plugin.renderer)

    def importer(self, modality: str) -> Callable[..., Any] | None:
        """Import what reads LoRA files for a modality (`Plugin.importer`), None where no plugin names one.

        Raises:
            MissingExtraError: An optional package is not installed.
            RegistryError: Two plugins name one, its import fails, or it cannot be called.
        """
        return self._function(modality, "importer", lambda plugin: plugin.importer)

    def formats(self, modality: str | None = None) -> dict[str, Entry]:
        """Formats of `export` by name: all, or those of a modality and the core's."""
        return {
            name: entry
            for source in self.installed
            if modality is None or source.plugin.namespace in {modality, ""}
            for name, entry in source.plugin.exporters.items()
        }

    def exporter(self, name: str, modality: str) -> Callable[..., Any]:
        """Import what writes a format (`Plugin.exporters`), of a modality or else of the core.

        Raises:
            MissingExtraError: An optional package is not installed.
            RegistryError: The modality has no such format, two plugins write it, its import fails, or it cannot be
                called.
        """

        def target_of(plugin: Plugin) -> str:
            return plugin.exporters[name].target if name in plugin.exporters else ""

        for place in dict.fromkeys((modality, "")):
            found = self._function(place, f"{name} exporter", target_of)
            if found is not None:
                return found
        raise RegistryError(f"no format '{name}' for modality '{modality}'; {nearest(name, self.formats(modality))}")

    def predict_flags(self) -> dict[str, dict[str, Flag]]:
        """What plugins add to `predict`, by modality and name."""
        found: dict[str, dict[str, Flag]] = {}
        for source in self.installed:
            if source.plugin.predict_flags:
                found.setdefault(source.plugin.namespace, {}).update(source.plugin.predict_flags)
        return found

    def _function(
        self, modality: str, what: str, target_of: Callable[[Plugin], str]
    ) -> Callable[..., Any] | None:  # fmt: skip
        """Import the one function that a plugin of the modality names, None where none does.

        Raises:
            MissingExtraError: An optional package is not installed.
            RegistryError: Two plugins name one, its import fails, or it cannot be called.
        """
        sources = [s for s in self.installed if target_of(s.plugin) and s.plugin.namespace == modality]
        if not sources:
            return None
        if len(sources) > 1:
            owners = " and ".join(f"plugin '{s.plugin.name}' of distribution '{s.distribution}'" for s in sources)
            raise RegistryError(f"modality '{modality or CORE}' has two {what}s, of {owners}; uninstall one.")
        target = target_of(sources[0].plugin)
        found = self._import(target, f"the {what} of modality '{modality or CORE}'", sources[0])
        if not callable(found):
            raise RegistryError(
                f"the {what} of modality '{modality or CORE}' cannot be used: '{target}' is no function."
            )
        return found

    def entries(self, noun: Noun | None = None, modality: str | None = None) -> Iterator[Listed]:
        """Go through the registered entries in a fixed order.

        Args:
            noun: Only this kind.
            modality: Only this modality, "" for the core.

        Yields:
            One line for each entry, two for a name with two owners.
        """
        for key in sorted(self._offers, key=lambda key: (NOUNS.index(key[0]), key[1], key[2])):
            if noun in {None, key[0]} and modality in {None, key[1]}:
                for offer in self._offers[key]:
                    plugin = offer.source.plugin.name if offer.source else ""
                    yield Listed(*key, offer.entry, plugin, offer.distribution, self._state(key, offer))

    def check(self) -> None:
        """Raise for every key that is registered twice.

        Raises:
            RegistryError: At least one key has two owners.
        """
        conflicts = [_conflict(key, offers) for key, offers in self._offers.items() if len(offers) > 1]
        if conflicts:
            raise RegistryError("\n".join(conflicts))

    def name_of(self, resolved: Resolved, *, modality: str | None) -> str:
        """The shortest name that leads back to `resolved` from `modality`."""
        if resolved.source is None:
            return resolved.entry.target
        key: Key = (resolved.noun, resolved.modality, resolved.name)
        if self._short_keys(resolved.noun, resolved.name, modality)[:1] == [key]:
            return resolved.name
        return _full_name(key)

    def short_name_of(self, cls: type, *, modality: str | None = None) -> str:
        """The name to write into a file for a class; its import path where it is not registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        known = self._names.get(cls)
        if known is None:
            known = next((o for offers in self._offers.values() for o in offers if o.entry.target == target), None)
        return target if known is None else self.name_of(known, modality=modality)

    def _import(self, target: str, label: str, source: Installed | None) -> object:
        """What `package.module:Object` names.

        Raises:
            MissingExtraError: An optional package is not installed.
            RegistryError: The import fails for another reason; the sentence begins with `label`.
        """
        module_name, _, attribute = target.partition(":")
        try:
            found: object = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:
            if isinstance(error, PeftModalError):
                raise  # already a sentence, such as the one of `require`
            optional = absent_package(error)
            if optional and optional not in self.packages:
                command = source.install_command([optional]) if source else install_command([optional])
                raise MissingExtraError(f"{label} needs {optional}, not installed; run: {command}") from error
            origin = f"plugin '{source.plugin.name}' of distribution '{source.distribution}'" if source else "the path"
            raise RegistryError(
                f"{label} cannot be loaded: {origin}, target '{target}', fails with {_cause(error)}"
            ) from error
        return found

    def _short_keys(self, noun: Noun, name: str, modality: str | None) -> list[Key]:
        if modality is not None:
            places = dict.fromkeys([modality, ""])
            return [(noun, place, name) for place in places if (noun, place, name) in self._offers]
        if (noun, "", name) in self._offers:
            return [(noun, "", name)]
        found = [key for key in self._offers if key[0] == noun and key[2] == name]
        if len(found) > 1:
            choices = " or ".join(sorted(f"'{_full_name(key)}'" for key in found))
            raise RegistryError(f"{noun} '{name}' exists in several modalities; write {choices}.")
        return found

    def _single(self, key: Key) -> Resolved:
        offers = self._offers[key]
        if len(offers) > 1:
            raise RegistryError(_conflict(key, offers))
        return offers[0]

    def _from_path(self, noun: Noun, path: str) -> Resolved:
        module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
        if not self.allows(path):
            allowed = ", ".join(sorted(self.packages))
            raise RegistryError(
                f"{noun} '{path}' names a package that is not allowed; allowed: {allowed} and every peft_modal_*. "
                "Register a plugin (entry-point group 'peft_modal.modalities') to add yours."
            )
        if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
            raise RegistryError(f"{noun} '{path}' is not an import path; write 'package.module:Object'.")
        target = f"{module}:{attribute}"
        for key, offers in self._offers.items():
            if key[0] == noun and any(offer.entry.target == target for offer in offers):
                return self._single(key)
        owner = next((source for source in self.installed if root_package(path) in source.packages), None)
        modality = owner.plugin.namespace if owner else ""
        return Resolved(Entry(target), noun, modality, target, owner.distribution if owner else "")

    def _state(self, key: Key, offer: Resolved) -> str:
        offers = self._offers[key]
        if len(offers) > 1:
            return f"broken: registered twice, by {_owners(offers)}"
        if offer.source and (missing := missing_packages(offer.entry.requires)):
            return f"missing extra: {offer.source.install_command(missing)}"
        return "ok"

    def _unknown(self, noun: Noun, name: str, modality: str | None) -> str:
        own = {key[2] for key in self._offers if key[0] == noun and (modality is None or key[1] in {modality, ""})}
        full = {_full_name(key) for key in self._offers if key[0] == noun}
        where = f" for modality '{modality}'" if modality else ""
        text = [f"unknown {noun} '{name}'{where}; {nearest(name, full if '.' in name else own)}"]
        elsewhere = sorted(_full_name(key) for key in self._offers if key[0] == noun and key[2] == name)
        if elsewhere:
            text.append(f"It exists in another modality: write {' or '.join(map(repr, elsewhere))} to use that one.")
        text.extend(
            f"Plugin '{broken.name}' of distribution '{broken.distribution}' is broken and may supply it: "
            f"{broken.reason}."
            for broken in self.broken
        )
        text.append("If it was added just now, run `pip install -e .` again: new entry points need a fresh install.")
        return " ".join(text)


@functools.cache
def default_registry() -> Registry:
    """The registry of everything installed, read once per process."""
    return Registry.discover()


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _full_name(key: Key) -> str:
    return f"{key[1] or CORE}.{key[2]}"


def _owners(offers: Sequence[Resolved]) -> str:
    return " and ".join(
        f"plugin '{offer.source.plugin.name if offer.source else '?'}' of distribution '{offer.distribution}'"
        for offer in offers
    )


def _conflict(key: Key, offers: Sequence[Resolved]) -> str:
    return f"{key[0]} '{_full_name(key)}' is registered twice, by {_owners(offers)}; uninstall or rename one."
