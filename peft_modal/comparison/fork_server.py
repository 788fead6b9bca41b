"""Runs forked from a process that has imported what they need: of a short run, imports are half the time.

`python -m peft_modal.comparison.fork_server MODULE ...` imports the modules; then it reads a line of JSON from standard
input for each run, `[LOG, ARGUMENT, ...]`, and answers on standard output with a line that holds the exit code. Nothing
but imports happens before a fork, so that no thread pool exists that a fork would break.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from peft_modal.comparison import child
from peft_modal.comparison.process import require_success


class ForkServer:
    """Makes runs like `run_child`, without their imports.

    Args:
        modules: What runs need. The server starts with the first run.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = tuple(modules)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, arguments: Sequence[str], *, log: Path, tick_s: float, tick: Callable[[], None]) -> None:
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
            server = self._process or self._start(output.fileno())
        try:
            code = self._ask(server, [str(log.resolve()), *arguments], tick_s, tick)
        except BaseException:
            self.stop()
            raise
        if code is None:
            code = server.wait() or 1
            self.stop()
        require_success(code, log, started_at)

    def stop(self) -> None:
        """End the server, and the run that it is at."""
        if self._process is None:
            return
        # A run is in the server's group; its own lifeline would end it, too, but not before this returns.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:
            self._process = None

    def _start(self, errors: int) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(  # noqa: S603 — our own interpreter and module
            [sys.executable, "-m", "peft_modal.comparison.fork_server", *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,
        )
        return self._process

    @staticmethod
    def _ask(
        server: subprocess.Popen[bytes], request: Sequence[str], tick_s: float, tick: Callable[[], None]
    ) -> int | None:
        """The run's exit code; None when the server itself has ended."""
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            return None
        due = time.monotonic() + tick_s
        while not select.select([server.stdout], [], [], max(0.0, due - time.monotonic()))[0]:
            tick()
            due = time.monotonic() + tick_s
        answer = server.stdout.readline()
        return int(answer) if answer else None


def main(modules: Sequence[str]) -> int:
    """Serve until standard input ends; in a forked process, the run's exit code."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    for module in modules:
        with suppress(Exception):  # the run that needs it says so
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a run would copy every page that it looks at
    # Unbuffered: what follows a request is for the run, whose lifeline standard input is.
    with open(0, "rb", buffering=0, closefd=False) as requests:
        while line := requests.readline():
            log, *arguments = json.loads(line)
            forked = os.fork()
            if not forked:
                os.close(answers)
                output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                os.dup2(output, 1)
                os.dup2(output, 2)
                return child.main(arguments)
            _, status = os.waitpid(forked, 0)
            with suppress(BrokenPipeError):
                os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
