"""Which registered method attaches to which registered backbone; the table that documentation and `list` show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_modal.anatomy import Backbone
from peft_modal.errors import AttachError, MissingExtraError, RegistryError, SelectionError
from peft_modal.methods.base import Method
from peft_modal.registry import Listed, Registry


@dataclass(frozen=True)
class MatrixRow:
    """One pair; names as they are written in a configuration, `pointcloud.point_mae` outside the core."""

    method: str
    backbone: str
    works: bool
    reason: str
    """Why it does not, as a sentence; empty where it works."""


def method_matrix(registry: Registry) -> list[MatrixRow]:
    """Attach every registered method to every registered backbone.

    Two class methods make a plugin's classes usable here without arguments:

    * a backbone class offers `tiny() -> Backbone`: the same network and anatomy at toy size with `weights="random"`,
      made in well under a second and without a download;
    * a method class whose constructor needs arguments offers `example() -> Method`; others are made by `cls()`.

    A method of one modality is tried on backbones of that modality only.

    Args:
        registry: Where methods and backbones are looked up.

    Returns:
        One row for each pair, methods in the registry's order; a class that cannot be loaded or made gives rows, too.
    """
    backbones = [(listed, _make_backbone(registry, listed)) for listed in registry.entries("backbone")]
    rows = []
    for listed in registry.entries("method"):
        method = _make_method(registry, listed)
        for other, backbone in backbones:
            if listed.modality not in {"", other.modality}:
                reason = f"it is a method of modality '{listed.modality}'"
            else:
                reason = _attach(method, backbone)
            rows.append(MatrixRow(_name(listed), _name(other), not reason, reason))
    return rows


def example_methods(registry: Registry, *, modality: str) -> dict[str, Method]:
    """Every method that a backbone of `modality` can be asked for, made as `method_matrix` makes it.

    Args:
        registry: Where they are looked up, usually `default_registry()`.
        modality: The backbone's; the core's methods belong to all.

    Returns:
        By the name written in a configuration of that modality; methods whose optional packages are not installed are
        left out.

    Raises:
        RegistryError: One of them cannot be loaded or made.
    """
    methods = {}
    for listed in registry.entries("method"):
        if listed.modality in {"", modality} and not listed.state.startswith("missing extra"):
            method = _make_method(registry, listed)
            if isinstance(method, str):
                raise RegistryError(f"method '{_name(listed)}': {method}")
            methods[listed.name] = method
    return methods


def matrix_table(rows: Sequence[MatrixRow]) -> str:
    """The rows as a Markdown table: methods down, backbones across."""
    backbones = list(dict.fromkeys(row.backbone for row in rows))
    works = {(row.method, row.backbone): row.works for row in rows}
    lines = ["| method | " + " | ".join(backbones) + " |", "|---|" + "---|" * len(backbones)]
    for method in dict.fromkeys(row.method for row in rows):
        cells = ("yes" if works[method, backbone] else "no" for backbone in backbones)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load_entry(registry: Registry, listed: Listed) -> type:
    """Import the class behind a listed entry.

    Raises:
        MissingExtraError: An optional package is not installed.
        RegistryError: It cannot be imported, or has two owners.
    """
    return registry.load(registry.resolve(listed.noun, f"{listed.modality or 'core'}.{listed.name}", modality=None))


def _name(listed: Listed) -> str:
    return f"{listed.modality}.{listed.name}" if listed.modality else listed.name


def _make_backbone(registry: Registry, listed: Listed) -> Backbone | str:
    try:
        cls = load_entry(registry, listed)
    except (MissingExtraError, RegistryError) as error:
        return str(error)
    if not callable(getattr(cls, "tiny", None)):
        return f"{cls.__name__} offers no classmethod tiny() -> Backbone, so it cannot be tried"
    try:
        backbone = cls.tiny()  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 - a plugin's fault is its row's reason and nobody else's end
        return f"{cls.__name__}.tiny() fails with {type(error).__name__}: {error}"
    return backbone if isinstance(backbone, Backbone) else f"{cls.__name__}.tiny() makes no Backbone"


def _make_method(registry: Registry, listed: Listed) -> Method | str:
    try:
        cls = load_entry(registry, listed)
    except (MissingExtraError, RegistryError) as error:
        return str(error)
    if not issubclass(cls, Method):
        return f"{cls.__name__} is no Method"
    example = getattr(cls, "example", None)
    try:
        return cls() if example is None else example()
    except TypeError as error:
        return f"{cls.__name__} needs arguments and offers no classmethod example() -> Method ({error})"
    except Exception as error:  # noqa: BLE001 - see `_make_backbone`
        return f"{cls.__name__} cannot be made: {type(error).__name__}: {error}"


def _attach(method: Method | str, backbone: Backbone | str) -> str:
    if isinstance(method, str):
        return method
    if isinstance(backbone, str):
        return backbone
    try:
        adapter = method.attach(backbone, name="matrix")
    except (AttachError, SelectionError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - see `_make_backbone`
        return f"attaching fails with {type(error).__name__}: {error}"
    adapter.detach()
    return ""
