"""Plugins: which are installed, from which distribution, and which cannot be used and why."""

from __future__ import annotations

from collections.abc import Iterator

from peft_modal.diagnosis.finding import Finding
from peft_modal.plugin_api import NOUNS, Broken, Installed
from peft_modal.registry import Registry


def check_plugins() -> Iterator[Finding]:
    """Every plugin that an installed distribution names, and names that two of them claim.

    Yields:
        One finding for each.
    """
    registry = Registry.discover()
    if not any(source.plugin.name == "core" for source in registry.installed):
        yield Finding("plugins", "core", "problem", "the core's own entry point is not registered: there is no method",
                      "pip install -e .  (in the repository; new entry points need a fresh install)")  # fmt: skip
    for source in registry.installed:
        yield _installed(source)
    for broken in registry.broken:
        yield _broken(broken)
    for listed in registry.entries():
        if listed.state.startswith("broken: registered twice"):
            name = f"{listed.noun} '{listed.name}'"
            yield Finding("plugins", name, "problem", listed.state.removeprefix("broken: "),
                          f"pip uninstall {listed.distribution}  (or another of them)")  # fmt: skip


def _installed(source: Installed) -> Finding:
    counts = [f"{len(source.plugin.entries(noun))} {noun}" for noun in NOUNS if source.plugin.entries(noun)]
    text = f"{', '.join(counts) or 'nothing'} from {source.distribution}"
    if source.state != "ok":
        return Finding("plugins", source.plugin.name, "warning", f"{text}; parts of it need its extra",
                       source.state.removeprefix("missing extra: "))  # fmt: skip
    return Finding("plugins", source.plugin.name, "ok", text)


def _broken(broken: Broken) -> Finding:
    return Finding(
        "plugins", broken.name, "problem", f"from {broken.distribution} ({broken.module}) is broken: {broken.reason}",
        f"pip install --upgrade {broken.distribution}  (or pip uninstall {broken.distribution})",
    )  # fmt: skip
