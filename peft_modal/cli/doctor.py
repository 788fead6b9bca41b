"""`doctor`: look at an installation, say what is wrong, and name the command that mends it.

Standard library only at module level: it has to work where torch, or anything else, cannot even be imported.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict

from peft_modal.cli.options import Options
from peft_modal.cli.output import write, write_json
from peft_modal.diagnosis import Finding, diagnose

_MARKS = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}


def doctor(options: Options) -> int:
    """Print every finding.

    Returns:
        0 without a problem, 1 with one; warnings are no problem.
    """
    findings = diagnose()
    problems = [finding for finding in findings if finding.status == "problem"]
    if options.json:
        write_json({
            "ok": not problems,
            "findings": [asdict(finding) for finding in findings],
        })  # fmt: skip
        return int(bool(problems))
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            write(f"\n{section}" if finding is not findings[0] else section)
        _print(finding)
    counts = Counter(finding.status for finding in findings)
    write("\n")
    write(f"{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} ok")
    return int(bool(problems))


def _print(finding: Finding) -> None:
    mark = _MARKS[finding.status]
    write(f"  {mark}{finding.name}: {finding.text}" if finding.text else f"  {mark}{finding.name}")
    if finding.mend:
        write(f"  {' ' * len(mark)}mend: {finding.mend}" if sys.stdout.isatty() else f"  {mark}{finding.name}: mend: "
              f"{finding.mend}")  # fmt: skip
