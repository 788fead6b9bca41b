"""Installed packages against the bounds that our own metadata names, and what shadows us."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peft_modal.diagnosis.finding import Finding

OWN: Final = "peft-modal"
_NO_METADATA: Final = "peft-modal is used without being installed, so its bounds and plugins cannot be read"
_INSTALL: Final = "pip install -e .  (in the repository)"
_OURS: Final = ("peft_modal", "peft_modal_clip", "peft_modal_diffusion", "peft_modal_pointcloud", "peft_modal_heads")
_NEEDED: Final = ("torch", "torchvision", "lightning", "jsonargparse", "numpy", "safetensors", "rich", "yaml", "PIL")
"""Import names that a file in the working folder may hide."""


@dataclass(frozen=True)
class _Missing:
    requirement: str
    reason: str


def check_dependencies() -> Iterator[Finding]:
    """Each dependency of the core: its version against our bound.

    Yields:
        One finding for each.
    """
    required = _required()
    if required is None:
        yield Finding("packages", OWN, "problem", _NO_METADATA, _INSTALL)
        return
    for text in required:
        name, fault, version = _check(text, extra="")
        if name is None:
            continue
        if fault:
            yield Finding("packages", name, "problem", fault.reason, f'pip install "{fault.requirement}"')
        else:
            yield Finding("packages", name, "ok", version)


def check_extras() -> Iterator[Finding]:
    """Each extra: complete, or what it lacks. A missing extra is no problem: nobody needs all of them.

    Yields:
        One finding for each.
    """
    required = _required()
    if required is None:
        return
    for extra in _extras():
        faults, found = [], []
        for text in _expanded(required, extra):
            name, fault, version = _check(text, extra=extra)
            if fault:
                faults.append(fault)
            elif name is not None:
                found.append(f"{name} {version}")
        name, mend = f"[{extra}]", f'pip install "{OWN}[{extra}]"'
        if not faults:
            yield Finding("extras", name, "ok", ", ".join(dict.fromkeys(found)))
            continue
        # An absent package is somebody's choice; one of a wrong version breaks what is there.
        wrong = any(not fault.reason.endswith("not installed") for fault in faults)
        text = "; ".join(dict.fromkeys(fault.reason for fault in faults))
        yield Finding("extras", name, "problem" if wrong else "warning", text, mend)


def check_shadowing() -> Iterator[Finding]:
    """Whether another folder or file is imported in the place of one of our packages, or stands ready to be.

    Yields:
        One finding for each.
    """
    core = Path(__file__).resolve().parents[2]
    # Beside the core in an installation, one level down in the repository.
    homes = {core, core / "modalities", core / "heads"}
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            yield Finding("packages", name, "problem", "cannot be found, though it belongs to peft-modal", _INSTALL)
            continue
        places = [Path(place).resolve() for place in spec.submodule_search_locations or (spec.origin or "",)]
        if spec.origin is None or not homes.intersection(place.parent for place in places):
            yield Finding("packages", name, "problem", f"'{places[0]}' hides ours, which belongs below '{core}'",
                          "rename it, or start from another folder")  # fmt: skip
    here = Path.cwd()
    if {"", str(here)}.isdisjoint(sys.path):
        return
    for name in _NEEDED:
        local = next((place for place in (here / name / "__init__.py", here / f"{name}.py") if place.exists()), None)
        if local is not None:
            yield Finding("packages", name, "problem", f"'{local}' hides the installed package",
                          "rename it, or start from another folder")  # fmt: skip


def version_of(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed or its metadata is damaged."""
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError, OSError):
        return None


def _required() -> list[str] | None:
    try:
        return importlib.metadata.requires(OWN) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> list[str]:
    names = importlib.metadata.metadata(OWN).get_all("Provides-Extra") or []
    return [name for name in names if name not in {"all", "dev"}]  # the sum of the others, and our own tools


def _expanded(required: Iterable[str], extra: str, *, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Requirements of an extra; one that names our own extras stands for theirs.

    Yields:
        Requirements as text, with markers that hold for `extra`.
    """
    from packaging.requirements import Requirement

    required = list(required)
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue
        if _canonical(requirement.name) == OWN:
            for other in sorted(requirement.extras - seen - {extra}):
                yield from (_for_extra(t, extra) for t in _expanded(required, other, seen=seen | {extra}))
        else:
            yield text


def _for_extra(text: str, extra: str) -> str:
    """A requirement of one extra as one of another, so that its marker holds there."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    requirement.marker = None
    return f'{requirement} ; extra == "{extra}"'


def _check(text: str, *, extra: str) -> tuple[str | None, _Missing | None, str]:
    """Name, what is wrong, and the version found; no name where the requirement does not apply here."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return None, None, ""
    wanted = str(requirement).partition(";")[0].strip()
    version = version_of(requirement.name)
    if version is None:
        return requirement.name, _Missing(wanted, f"{requirement.name} is not installed"), ""
    if not requirement.specifier.contains(version, prereleases=True):
        reason = f"{requirement.name} {version} is installed, {requirement.specifier} is needed"
        return requirement.name, _Missing(wanted, reason), version
    return requirement.name, None, version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
