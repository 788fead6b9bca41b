"""How workers share a comparison, asked of any database."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import comparisons
import pytest

from peft_modal.comparison.storage import Board, LostRunError

WORKER = Path(__file__).parent / "board_worker.py"


def board_of(url, plan, worker="me", **arguments):
    board = Board(url, "study", worker=worker, **arguments)
    board.bind(plan)
    return board


def start(url, plan_file, out, seconds=0.05, workers=1):
    command = [sys.executable, str(WORKER), url, "study", str(plan_file), str(out), str(seconds), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def made(out):
    lines = [line.split() for line in (out / "made.txt").read_text().splitlines()]
    return (Counter(key for what, key, _ in lines if what == kind) for kind in ("start", "end"))


def an_hour_passes(board):
    """Every sign of life is an hour old."""
    from sqlalchemy import DateTime, column, table, update

    signs = table("trial_heartbeats", column("heartbeat", DateTime))
    long_ago = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=1)
    with board._storage.engine.begin() as connection:
        connection.execute(update(signs).values(heartbeat=long_ago))


def write_plan(tmp_path, plan):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    return path


def assert_shared(url, tmp_path, plan, count):
    """Several workers that start together make every run of the plan exactly once."""
    path = write_plan(tmp_path, plan)
    workers = [start(url, path, tmp_path, workers=count) for _ in range(count)]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]

    assert [worker.returncode for worker in workers] == [0] * count, errors
    started, ended = made(tmp_path)
    assert started == ended == Counter(dict.fromkeys(comparisons.complete(plan), 1))
    lines = (tmp_path / "made.txt").read_text().splitlines()
    assert len({line.split()[2] for line in lines}) == count, "every worker has taken something"
    assert {one.state for one in board_of(url, plan).progress().values()} == {"done"}


def assert_taken_over(url, tmp_path, plan):
    """A worker killed in the middle of a run loses it to another, and nothing is there twice."""
    path = write_plan(tmp_path, plan)
    victim = start(url, path, tmp_path, seconds=600)
    while not (tmp_path / "made.txt").exists():
        assert victim.poll() is None, victim.communicate()[1]
        time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    other = start(url, path, tmp_path)
    assert "waiting" not in other.communicate(timeout=300)[1], "on this machine it is known at once that it is dead"
    started, ended = made(tmp_path)

    first = plan.due({})[0].key
    assert ended == Counter(dict.fromkeys(comparisons.complete(plan), 1))
    assert started == ended + Counter([first])
    progress = board_of(url, plan).progress()
    assert plan.due(progress) == []
    assert progress.keys() == comparisons.complete(plan).keys()


def assert_lost(url, plan):
    """A worker that gives no sign of life for long loses its run, and what it makes of it does not count."""
    key = plan.due({})[0].key
    silent, other = board_of(url, plan, "silent"), board_of(url, plan, "other")
    lost = silent.take([key])
    assert other.take([key]) is None
    an_hour_passes(silent)

    assert other.take([key]).key == key
    with pytest.raises(LostRunError):
        silent.sign_of_life(lost)
    with pytest.raises(LostRunError):
        silent.finish(lost, comparisons.done(val=0.9), value=0.9)
    assert other.progress()[key].state == "running"
