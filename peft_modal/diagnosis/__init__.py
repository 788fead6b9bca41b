"""What `doctor` looks at. Every check survives a broken installation; none imports anything heavy at module level."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from peft_modal.diagnosis.combinations import known_bad_combinations
from peft_modal.diagnosis.finding import Finding
from peft_modal.diagnosis.machine import folders, machine, torch_and_gpu
from peft_modal.diagnosis.packages import dependencies, extras, shadowing
from peft_modal.diagnosis.plugins import plugins

__all__ = ["Finding", "diagnose"]

_CHECKS: Final[tuple[Callable[[], Iterable[Finding]], ...]] = (
    machine, folders, torch_and_gpu, dependencies, extras, plugins, shadowing, known_bad_combinations,
)  # fmt: skip


def diagnose() -> list[Finding]:
    """Every finding, in a fixed order; a check that breaks becomes a finding itself."""
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - whatever is broken here is what the user wants to be told
            findings.append(
                Finding("doctor", check.__name__, "problem", f"this check itself failed: {type(error).__name__}: {error}")
            )
    return findings
