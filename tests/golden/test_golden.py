"""Every golden case: the product computes the authors' numbers."""

from __future__ import annotations

from pathlib import Path

from golden_runners import run_case


def test_case(case_folder: Path) -> None:
    run_case(case_folder)
