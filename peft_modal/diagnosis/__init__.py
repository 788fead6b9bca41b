"""What `doctor` looks at. Every check survives a broken installation; none imports anything heavy at module level."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from peft_modal.diagnosis.combinations import check_combinations
from peft_modal.diagnosis.finding import Finding
from peft_modal.diagnosis.machine import check_folders, check_machine, check_torch
from peft_modal.diagnosis.packages import check_dependencies, check_extras, check_shadowing
from peft_modal.diagnosis.plugins import check_plugins

__all__ = ["Finding", "diagnose"]

_CHECKS: Final[tuple[Callable[[], Iterable[Finding]], ...]] = (
    check_machine, check_folders, check_torch, check_dependencies, check_extras, check_plugins, check_shadowing,
    check_combinations,
)  # fmt: skip


def diagnose() -> list[Finding]:
    """Every finding, in a fixed order; a check that breaks becomes a finding itself."""
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - whatever is broken here is what the user wants to be told
            findings.append(
                Finding(
                    "doctor", check.__name__, "problem", f"this check itself failed: {type(error).__name__}: {error}"
                )
            )
    return findings
