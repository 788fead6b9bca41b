"""Configurations found by name: a local file first, then the shipped ones, then those of plugins."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any, Final

from peft_modal.errors import ConfigError, nearest
from peft_modal.registry import Registry, default_registry

_SUFFIXES: Final = (".yaml", ".yml")
_OWN: Final = "peft-modal"


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file that `--config` can name."""

    name: str
    """Path below its folder, with `/`; for a local file the path as given."""
    origin: str
    """Distribution that ships it; "" for a local file."""
    file: Traversable

    @property
    def summary(self) -> str:
        """The first comment line of the file, "" if it starts otherwise."""
        first = self.file.read_text(encoding="utf-8").partition("\n")[0]
        return first.lstrip("# ").strip() if first.startswith("#") else ""


def list_configs(registry: Registry | None = None) -> list[ConfigFile]:
    """All shipped configurations, the core's first; local files are not listed."""
    registry = registry or default_registry()
    found: list[ConfigFile] = []
    own = _own_folder()
    if own is not None:
        found.extend(_walk(own, _OWN))
    for package, distribution in registry.config_packages:
        try:
            folder = resources.files(package)
        except ImportError:
            continue  # `find_config` names it among the places it could not look into
        found.extend(_walk(folder, distribution))
    return found


def find_config(name: str | Path, registry: Registry | None = None) -> ConfigFile:
    """Find a configuration by path or by name, the suffix may be left out.

    Raises:
        ConfigError: Nothing, or more than one shipped file, goes by that name.
    """
    registry = registry or default_registry()
    text = str(name)
    for path in _spellings(text):
        if Path(path).is_file():
            return ConfigFile(path, "", Path(path))
    shipped = list_configs(registry)
    wanted = set(_spellings(PurePosixPath(text).as_posix()))
    exact = [config for config in shipped if config.name in wanted]
    below = [config for config in shipped if PurePosixPath(config.name).name in wanted]
    # The core's own come first on purpose; among plugins nobody comes first.
    matches = [config for config in exact if config.origin == _OWN][:1] or exact or below
    if len(matches) > 1:
        choices = ", ".join(f"'{config.name}' of {config.origin}" for config in matches)
        raise ConfigError(f"--config {text}: several configurations have this name: {choices}; give a longer path.")
    if matches:
        return matches[0]
    places = ", ".join(package for package, _ in registry.config_packages) or "none"
    raise ConfigError(
        f"--config {text}: no such file in {Path.cwd()}, among the shipped configurations, or in the packages of "
        f"plugins ({places}); {nearest(text, {config.name for config in shipped})}"
    )


def read_config(config: ConfigFile) -> dict[str, Any]:
    """The content of a configuration file, {} for an empty one.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or is not a mapping.
    """
    from peft_modal.compose.yaml_text import parse_yaml  # here, so that `doctor` starts where PyYAML is missing

    try:
        text = config.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config.name}: cannot be read: {error}.") from error
    content = parse_yaml(text, source=config.name)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{config.name}: expected a mapping such as 'method: {{name: lora}}', got {content!r}.")
    return content


def _spellings(name: str) -> list[str]:
    return [name] if name.endswith(_SUFFIXES) else [name, *(name + suffix for suffix in _SUFFIXES)]


def _own_folder() -> Traversable | None:
    """`configs/` inside the installed package, else beside it in our own repository."""
    package = resources.files("peft_modal")
    packaged = package / "configs"
    if packaged.is_dir():
        return packaged
    repository = Path(str(package)).parent
    project = repository / "pyproject.toml"
    # Any folder called `configs` may lie beside an installed package; ours has our project file next to it.
    if not project.is_file() or not (repository / "configs").is_dir():
        return None
    named = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name")
    return repository / "configs" if named == _OWN else None


def _walk(folder: Traversable, origin: str, prefix: str = "") -> Iterator[ConfigFile]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _walk(item, origin, f"{prefix}{item.name}/")
        elif item.name.endswith(_SUFFIXES):
            yield ConfigFile(prefix + item.name, origin, item)
