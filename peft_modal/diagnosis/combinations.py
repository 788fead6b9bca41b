"""Combinations of packages that are known not to work, which no metadata of theirs tells."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Final

from peft_modal.diagnosis.finding import Finding
from peft_modal.diagnosis.packages import version_of

_MALICIOUS: Final = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""GHSA-w37p-236h-pfx3."""


def check_combinations() -> Iterator[Finding]:
    """Malicious releases, torch beside its companions, a torchvision for another torch, the optional pytorch3d.

    Yields:
        One finding for each.
    """
    yield from _malicious()
    yield from _torchaudio()
    yield from _torchvision()
    yield _pytorch3d()


def _malicious() -> Iterator[Finding]:
    for name, versions in _MALICIOUS.items():
        version = version_of(name)
        if version in versions:
            yield Finding(
                "combinations", name, "problem",
                f"{version} is a malicious upload (GHSA-w37p-236h-pfx3): it may have read your credentials",
                f'pip install "{name}>=2.6.6,<3", then change every password and token this machine holds',
            )  # fmt: skip


def _torchaudio() -> Iterator[Finding]:
    torch, audio = _release("torch"), _release("torchaudio")
    if torch is None or audio is None:
        return
    text = f"torchaudio {version_of('torchaudio')} beside torch {version_of('torch')}"
    if audio[:2] == (2, 11) and torch >= (2, 15):
        yield Finding("combinations", "torchaudio", "problem", f"{text}: built for CUDA 13.0, it refuses to import",
                      'pip install "torch>=2.11,<2.15"')  # fmt: skip
    else:
        yield Finding("combinations", "torchaudio", "ok", text)


def _torchvision() -> Iterator[Finding]:
    """Torchvision's metadata pins the torch that it was built for.

    Yields:
        One finding for each.
    """
    from packaging.requirements import Requirement

    torch, vision = version_of("torch"), version_of("torchvision")
    if torch is None or vision is None:
        return
    pinned = next(
        (r for r in map(Requirement, importlib.metadata.requires("torchvision") or ()) if r.name == "torch"), None
    )
    text = f"torchvision {vision} beside torch {torch}"
    # A local part (+cpu, +cu130) names the build, not another release.
    if pinned is not None and not pinned.specifier.contains(torch.partition("+")[0], prereleases=True):
        yield Finding("combinations", "torchvision", "problem", f"{text}: it is built for torch{pinned.specifier}",
                      'pip install --upgrade "torch>=2.11,<2.15" torchvision')  # fmt: skip
    else:
        yield Finding("combinations", "torchvision", "ok", text)


def _pytorch3d() -> Finding:
    if importlib.util.find_spec("pytorch3d") is None:
        return Finding("combinations", "pytorch3d", "ok", "not there, and not needed: point operations are our own")
    try:
        import pytorch3d
    except Exception as error:  # noqa: BLE001 - a build for another torch raises anything
        return Finding(
            "combinations", "pytorch3d", "warning", f"cannot be imported ({type(error).__name__}: {error})",
            "pip uninstall pytorch3d  (or build it for the installed torch)",
        )  # fmt: skip
    return Finding("combinations", "pytorch3d", "ok", str(getattr(pytorch3d, "__version__", "")))


def _release(name: str) -> tuple[int, ...] | None:
    from packaging.version import InvalidVersion, Version

    version = version_of(name)
    try:
        return None if version is None else Version(version).release
    except InvalidVersion:
        return None
