"""`list --matrix`: which method works on which backbone."""

from __future__ import annotations

import dataclasses

from peft_modal.cli.output import write_json, write_table
from peft_modal.registry import Registry


def list_matrix(registry: Registry, *, as_json: bool) -> None:
    """Attach every method to every backbone and print what happened; imports torch."""
    from peft_modal.testing.matrix import method_matrix

    rows = method_matrix(registry)
    if as_json:
        write_json([dataclasses.asdict(row) for row in rows])
        return
    write_table(
        "method x backbone",
        ("method", "backbone", "works", "why"),
        [(row.method, row.backbone, "works" if row.works else "refused", row.reason) for row in rows],
    )
