"""Workers share runs through a database: each run is taken once, and a dead worker's run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import comparisons
import pytest

from peft_modal.comparison.liveness import Badge
from peft_modal.comparison.plan import Progress
from peft_modal.comparison.storage import Board, LostRunError
from peft_modal.comparison.worker import require_all, work
from peft_modal.errors import ConfigError, DataError, MissingExtraError, TrainingError

WORKER = Path(__file__).parents[1] / "support/board_worker.py"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with Optuna's tables, which take a while to make."""
    path = tmp_path_factory.mktemp("empty") / "comparison.db"
    Board(f"sqlite:///{path}", "study", worker="me")._storage.engine.dispose()
    return path


@pytest.fixture
def url(tmp_path, empty):
    return f"sqlite:///{shutil.copy(empty, tmp_path)}"


def board_of(url, plan, worker="me", **arguments):
    board = Board(url, "study", worker=worker, **arguments)
    board.bind(plan, plan.mode)
    return board


def executor(made, fail=()):
    def execute(run, tick):
        made.append(run.key)
        if run.key in fail:
            raise DataError("broken data")
        return {"val/accuracy": run.lr, "test/accuracy": 0.5}

    return execute


def start(url, plan_file, out, seconds=0.05):
    command = [sys.executable, str(WORKER), url, "study", str(plan_file), str(out), str(seconds)]
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
    workers = [start(url, path, tmp_path) for _ in range(count)]
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


def test_each_run_is_taken_once(url):
    plan = comparisons.make()
    keys = [run.key for run in plan.due({})]
    boards = [board_of(url, plan, f"worker{i}") for i in range(2)]

    taken = [board.take(keys) for board in boards * 4]

    assert [claim.key for claim in taken[:6]] == keys
    assert taken[6:] == [None, None]


def test_a_run_that_two_workers_have_offered_at_once_is_made_once(url):
    plan = comparisons.make()
    key = plan.due({})[0].key
    board = board_of(url, plan)
    board._add(key)
    board._add(key)

    claim = board.take([key])
    assert board.take([key]) is None
    board.finish(claim, comparisons.done(val=0.5), value=0.5)
    assert board.take([key]) is None
    assert board.progress()[key].state == "done"


def test_workers_that_start_together_make_every_run_once(url, tmp_path):
    assert_shared(url, tmp_path, comparisons.make(seeds=range(4), cost_rounds=1), count=3)


def test_the_run_of_a_killed_worker_is_taken_over(url, tmp_path):
    assert_taken_over(url, tmp_path, comparisons.make(methods=["lora"]))


def test_a_worker_without_signs_of_life_loses_its_run(url):
    plan = comparisons.make()
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


def test_signs_of_life_keep_a_run(url):
    plan = comparisons.make()
    key = plan.due({})[0].key
    busy = board_of(url, plan, "busy")
    claim = busy.take([key])
    an_hour_passes(busy)
    busy.sign_of_life(claim)

    assert board_of(url, plan, "other").take([key]) is None


def test_a_stopped_worker_gives_its_run_back(url):
    plan = comparisons.make()

    def interrupted(run, tick):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(plan, board_of(url, plan), interrupted, publish=lambda _: None)
    keys = []
    progress = work(plan, board_of(url, plan, "other"), executor(keys), publish=lambda _: None)

    assert Counter(keys) == Counter(progress.keys())


def test_finished_runs_are_not_made_again(url):
    plan = comparisons.make()
    first, second = [], []
    before = work(plan, board_of(url, plan), executor(first), publish=lambda _: None)
    after = work(plan, board_of(url, plan), executor(second), publish=lambda _: None)

    assert len(first) == plan.size
    assert second == []
    assert after == before


def test_a_failed_run_is_kept_with_its_sentence_and_the_others_go_on(url):
    plan = comparisons.make()
    broken = plan.grid("lora")[2].key
    keys = []

    progress = work(plan, board_of(url, plan), executor(keys, fail={broken}), publish=lambda _: None)

    assert (progress[broken].state, progress[broken].error) == ("failed", "broken data")
    assert len(keys) == plan.size
    assert plan.choice("lora", progress).lr == 0.2
    with pytest.raises(TrainingError, match="broken data\n1 of 8 runs failed; --retry-failed"):
        require_all(plan, progress)


def test_failed_runs_are_made_again_when_asked(url):
    plan = comparisons.make(lrs=[0.1])
    broken = plan.grid("lora")[0].key
    work(plan, board_of(url, plan), executor([], fail={broken}), publish=lambda _: None)
    keys = []
    work(plan, board_of(url, plan), executor(keys), publish=lambda _: None)
    assert keys == []

    for worker in ("one", "two"):
        board = board_of(url, plan, worker)
        board.retry_failed()
    progress = work(plan, board, executor(keys), publish=lambda _: None)

    assert keys == [run.key for run in plan.chosen("lora", progress)]
    require_all(plan, progress)


def test_another_plan_under_the_same_name_is_refused(url):
    board_of(url, comparisons.make())

    with pytest.raises(
        ConfigError, match=r"another comparison: seeds \(was \[0, 1\], now \[0\]\); choose another --out"
    ):
        board_of(url, comparisons.make(seeds=[0]))


def test_a_worker_waits_for_the_plan_of_the_one_that_created_the_study(url, monkeypatch):
    plan = comparisons.make()
    creator = Board(url, "study", worker="creator")
    creator._storage.create_new_study(creator._optuna.create_study().directions, "study")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            study = creator._storage.get_study_id_from_name("study")
            creator._storage.set_study_user_attr(study, "plan", comparisons.make(seeds=[5]).to_dict())

    monkeypatch.setattr("peft_modal.comparison.storage.time.sleep", sleep)

    with pytest.raises(ConfigError, match="another comparison"):
        board_of(url, plan)
    assert len(waits) == 3


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "expected a database's URL"),
        ("oracledb://host/name", "no URL of a database"),
        ("sqlite:////nowhere/at/all.db", "cannot use sqlite:////nowhere/at/all.db: .*unable to open"),
        ("postgresql://me:secret@127.0.0.1:1/name", r"cannot use postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/name"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        Board(url, "study", worker="me")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_optuna_the_extra_is_named(url, monkeypatch):
    monkeypatch.setattr("peft_modal.extras.missing_packages", lambda names: [n for n in names if n == "optuna"])

    with pytest.raises(MissingExtraError, match=r"peft-modal\[search\]"):
        Board(url, "study", worker="me")


def test_without_its_driver_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("peft_modal.extras.missing_packages", lambda names: [n for n in names if n == "psycopg"])

    with pytest.raises(MissingExtraError, match=r"peft-modal\[postgresql\]"):
        Board("postgresql://me@localhost/name", "study", worker="me")


def test_a_badge_tells_whether_a_worker_of_this_machine_lives(tmp_path):
    with Badge(tmp_path) as mine, Badge(tmp_path) as other:
        assert not mine.is_dead(other.name)
        assert not mine.is_dead("elsewhere-1-abc")
        os.close(os.open(tmp_path / "workers" / (dead := other.name + "x"), os.O_CREAT))
        assert mine.is_dead(dead)
    assert list((tmp_path / "workers").iterdir()) == [tmp_path / "workers" / dead]


def test_progress_of_a_failed_run_is_complete(url):
    plan = comparisons.make()
    board = board_of(url, plan)
    ended = Progress("failed", error="no", seconds=2.0, host="here", versions={"torch": "2"})
    board.finish(board.take([plan.due({})[0].key]), ended, value=None)

    assert board.progress()[plan.due({})[0].key] == ended
