"""`new-plugin`: a small plugin that runs, to be changed into one's own."""

from __future__ import annotations

import keyword
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from peft_modal.cli.options import Options
from peft_modal.cli.output import write
from peft_modal.errors import ConfigError
from peft_modal.registry import CORE, default_registry

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST: Final = 40
_PLACEHOLDER: Final = "new_plugin_name"
"""In the templates, which are a plugin of this name; also in the spellings `new-plugin-name` and `NewPluginName`."""


def new_plugin(options: Options) -> int:
    """Write the plugin into a new folder and say how to go on."""
    assert options.name is not None
    folder = options.out if options.out is not None else Path(options.name)
    write_plugin(options.name, folder)
    write(
        f"{folder}: a plugin that registers the modality '{options.name}'. Now:\n"
        f"  cd {folder}\n"
        "  pip install -e .\n"
        "  python -m pytest\n"
        f"  python -m peft_modal fit --config {options.name}.yaml"
    )
    return 0


def write_plugin(name: str, folder: Path) -> None:
    """Write the files of a plugin, all or none.

    Args:
        name: Of its import package and modality.
        folder: Must not exist.

    Raises:
        ConfigError: The name cannot serve, or the folder exists or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"new-plugin: '{folder}' exists already; choose another name, or another folder with --out")
    _refuse(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for path, template in _templates(resources.files("peft_modal") / "templates" / "plugin"):
                target = unfinished / _filled(path, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_filled(template.read_text(encoding="utf-8"), name), encoding="utf-8")
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"new-plugin: '{folder}' cannot be written: {error.strerror}") from error


def _refuse(name: str) -> None:
    start = f"new-plugin: the name '{name}'"
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise ConfigError(
            f"{start} is no name of a package: up to {_LONGEST} lower-case letters, digits and single underscores, a "
            "letter first, such as 'sleep_eeg'"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in sys.stdlib_module_names:
        raise ConfigError(f"{start} is Python's own; choose another")
    if name == CORE or name in default_registry().modalities:
        raise ConfigError(f"{start} is a modality already, see 'python -m peft_modal list'; choose another")
    if find_spec(name) is not None:
        raise ConfigError(f"{start} is an installed package already and would hide it; choose another")


def _filled(text: str, name: str) -> str:
    words = name.split("_")
    for spelling, own in (
        (_PLACEHOLDER, name),
        ("new-plugin-name", "-".join(words)),
        ("NewPluginName", "".join(word.capitalize() for word in words)),
    ):
        text = text.replace(spelling, own)
    return text


def _templates(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """Go through the templates.

    Yields:
        The path that it is written to, and the file.
    """
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            if item.name != "__pycache__":
                yield from _templates(item, f"{prefix}{item.name}/")
        else:
            # Under its true name git would obey it here.
            yield prefix + (".gitignore" if item.name == "gitignore" else item.name), item
