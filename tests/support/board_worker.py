"""A worker of a comparison whose runs only take a moment: `board_worker.py URL STUDY PLAN OUT SECONDS WORKERS`.

Every run that it makes adds one line to OUT/made.txt when it starts and one when it ends. The first run of each of
WORKERS workers lasts until all of them have one, so that they share the plan however late a busy machine starts one.
"""

import json
import os
import sys
import time
from pathlib import Path

from peft_modal.comparison.liveness import Badge
from peft_modal.comparison.plan import COST, Plan
from peft_modal.comparison.storage import Board
from peft_modal.comparison.worker import work


def note(out, text):
    handle = os.open(out / "made.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(handle, f"{text}\n".encode())
    os.close(handle)


def meet(out, workers):
    (out / f"worker-{os.getpid()}").touch()
    while len(list(out.glob("worker-*"))) < workers:
        time.sleep(0.01)


def main(url, study, plan_file, out, seconds, workers):
    plan = Plan.from_dict(json.loads(Path(plan_file).read_text()))
    out = Path(out)

    def execute(run, tick):
        note(out, f"start {run.key} {os.getpid()}")
        meet(out, int(workers))
        time.sleep(float(seconds))
        tick()
        note(out, f"end {run.key} {os.getpid()}")
        if run.key == COST:
            return {label: {} for label in plan.methods}
        # The larger the better on validation data, the worse on test data.
        return {"val/accuracy": run.lr, "test/accuracy": 1 - run.lr, "params/trained_share": 0.5}

    with Badge(out) as badge:
        board = Board(url, study, worker=badge.name, is_dead=badge.is_dead)
        board.bind(plan)
        work(plan, board, execute, publish=lambda progress: None, poll_s=0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
