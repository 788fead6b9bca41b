"""Text for people and for programs, on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def write(text: str) -> None:
    """One piece of text with a line break at its end."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def write_json(value: object) -> None:
    """A value as indented JSON."""
    write(json.dumps(value, indent=2, ensure_ascii=False))


def write_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; in a pipe each row stays on one line, so that it can be searched.

    Args:
        title: Stands above.
        columns: Headings; empty columns are left out.
        rows: Cells.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    # Text objects, since rich would read the brackets of `peft-modal[extra]` as markup.
    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        table.add_column(Text(columns[i]), overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 10_000)
    console.print(table if rows else Text(f"{title}: none\n"))
