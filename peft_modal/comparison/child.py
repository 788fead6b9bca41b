"""The processes that a worker starts: they end when the worker does, however it ends.

`python -m peft_modal.comparison.child fit ...` is `python -m peft_modal fit ...` on such a lifeline. The worker holds
the other end of standard input; the kernel closes it even when the worker is killed, so that no orphan goes on writing
into a folder whose run another worker has taken over.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


def main(argv: Sequence[str]) -> int:
    """Run what the worker asks for and return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from peft_modal.cli.main import main as command_line

    if argv[0] == "fit":
        return command_line(argv)
    from peft_modal.comparison.steps import main as steps
    from peft_modal.errors import PeftModalError

    try:
        return steps(argv)
    except PeftModalError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
