"""How far a preparation has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import Progress

_PAUSE_S: Final = 10.0
"""Between two lines of a log."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on the error stream how much of something is done.

    Args:
        what: Its name, `latents`.
        total: How many there are.

    Yields:
        What to call with the number of those just done.
    """
    console = Console(stderr=True)
    if total and console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _Lines(what, total)


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.told = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= _PAUSE_S:
            self.told = now
            sys.stderr.write(f"{self.what} {self.done}/{self.total}\n")
