"""Running a child and saying in one sentence how it failed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from peft_modal.errors import TrainingError

_PREFIX: Final = "error: "
_TAIL_BYTES: Final = 20_000


def run_child(arguments: Sequence[str], *, log: Path, tick_s: float, tick: Callable[[], None]) -> None:
    """Run `peft_modal.comparison.child` to its end.

    Args:
        arguments: Of the child.
        log: File that its output is added to.
        tick_s: Seconds between two calls of `tick`.
        tick: Called while the child runs; when it raises, the child is killed.

    Raises:
        TrainingError: The child failed; the sentence is its own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        started_at = output.tell()
        child = subprocess.Popen(  # noqa: S603 — our own interpreter and module
            [sys.executable, "-m", "peft_modal.comparison.child", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
        try:
            while True:
                try:
                    code = child.wait(timeout=tick_s)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            assert child.stdin is not None
            child.stdin.close()
    require_success(code, log, started_at)


def require_success(code: int, log: Path, started_at: int) -> None:
    """Raise unless a child ended with 0.

    Args:
        code: Its exit code; negative when a signal ended it.
        log: File that holds its output.
        started_at: Byte where its output begins.

    Raises:
        TrainingError: The sentence that it ended with.
    """
    if code:
        raise TrainingError(_sentence(code, log, started_at))


def _sentence(code: int, log: Path, started_at: int) -> str:
    with log.open("rb") as file:
        file.seek(max(started_at, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines()]
    own = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
    if own:
        return " ".join(own)
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}; see {log}"
    return f"the process ended with code {code}: {next((line for line in reversed(lines) if line), 'no output')}"
