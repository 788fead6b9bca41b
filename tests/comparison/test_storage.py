"""Workers share runs through a database: each run is taken once, and a dead worker's run again."""

import os
import shutil
from collections import Counter
from dataclasses import replace

import comparisons
import pytest
from sharing import an_hour_passes, assert_lost, assert_shared, assert_taken_over, board_of

from peft_modal.comparison.liveness import Badge
from peft_modal.comparison.plan import COST, Progress
from peft_modal.comparison.storage import Board
from peft_modal.comparison.worker import failures, require_all, work
from peft_modal.errors import ConfigError, DataError, MissingExtraError, TrainingError


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with Optuna's tables, which take a while to make."""
    path = tmp_path_factory.mktemp("empty") / "comparison.db"
    Board(f"sqlite:///{path}", "study", worker="me")._storage.engine.dispose()
    return path


@pytest.fixture
def url(tmp_path, empty):
    return f"sqlite:///{shutil.copy(empty, tmp_path)}"


def executor(made, fail=()):
    def execute(run, tick):
        made.append(run.key)
        if run.key == COST:
            return {}
        if run.key in fail:
            raise DataError("broken data")
        return {"val/accuracy": run.lr, "test/accuracy": 0.5}

    return execute


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
    assert_lost(url, comparisons.make())


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
        board.retry([broken])
    progress = work(plan, board, executor(keys), publish=lambda _: None)

    assert keys == [run.key for run in plan.chosen("lora", progress)]
    require_all(plan, progress)


def test_another_plan_under_the_same_name_is_refused(url):
    board_of(url, comparisons.make())

    with pytest.raises(
        ConfigError, match=r"another comparison: metric \(was \"accuracy\", now \"loss\"\); choose another --out"
    ):
        board_of(url, comparisons.make(metric="loss"))


def test_methods_seeds_and_rates_may_be_added_and_left_out(url, capsys):
    first, second = comparisons.make(), comparisons.make(["lora", "ssf"], lrs=(0.2, 0.4), seeds=(0, 1, 2))
    before = work(first, board_of(url, first), executor([]), publish=lambda _: None)
    capsys.readouterr()
    keys = []
    after = work(second, board_of(url, second), executor(keys), publish=lambda _: None)

    assert set(keys) == {run.key for run in second.known(after)} - before.keys()
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines() if "[" in line]
    assert told == [f"[{second.size - len(keys) + done + 1}/{second.size}]" for done in range(len(keys))]
    assert "runs/lora/lr0.4/seed0" in keys
    assert "runs/lora/lr0.2/seed0" not in keys
    again = []
    work(first, board_of(url, first), executor(again), publish=lambda _: None)
    assert again == []


def test_runs_that_were_made_elsewhere_count_and_failed_ones_are_made_again(url, tmp_path, empty):
    plan = comparisons.make()
    broken = plan.grid("lora")[0].key
    before = work(plan, board_of(url, plan), executor([], fail={broken}), publish=lambda _: None)
    here = Board(f"sqlite:///{shutil.copy(empty, tmp_path / 'here.db')}", "study", worker="here")
    here.bind(plan, finished=before)
    keys = []
    after = work(plan, here, executor(keys), publish=lambda _: None)

    assert keys == [broken]
    assert {key: one.figures for key, one in after.items() if key != broken} == {
        key: one.figures for key, one in before.items() if key != broken
    }


def test_costs_are_measured_again_with_a_new_method(url):
    def costs(methods, rounds=1):
        plan, keys = comparisons.make(methods, cost_rounds=rounds), []

        def execute(run, tick):
            keys.append(run.key)
            return {label: {} for label in plan.methods} if run.key == COST else comparisons.done(val=0.5).figures

        work(plan, board_of(url, plan), execute, publish=lambda _: None)
        return keys.count(COST)

    assert [costs(["lora"]), costs(["lora", "ssf"]), costs(["ssf"]), costs(["ssf", "lora"])] == [1, 1, 0, 0]
    assert [costs(["ssf"], rounds=2), costs(["lora"], rounds=0), costs(["ssf"], rounds=2)] == [1, 0, 0]


def test_a_method_with_other_arguments_under_the_same_name_is_refused(url):
    plan = comparisons.make(["lora"])
    board_of(url, plan)
    other = replace(plan, methods={"ssf": {"name": "ssf"}, "lora": {"name": "lora", "rank": 3}})

    with pytest.raises(ConfigError, match=r"another comparison: methods\.lora\.rank \(was null, now 3\)"):
        board_of(url, other)


def test_a_method_whose_folder_another_one_has_is_refused(url):
    board_of(url, comparisons.make(["lora(a=[1])"]))
    board_of(url, comparisons.make(["ssf"]))

    with pytest.raises(ConfigError, match=r"the folders of 'lora\(a=\[1\]\)' and 'lora\(a=\{1\}\)' have one name"):
        board_of(url, comparisons.make(["lora(a={1})"]))


def test_a_worker_waits_for_the_plan_of_the_one_that_created_the_study(url, monkeypatch):
    plan = comparisons.make()
    creator = Board(url, "study", worker="creator")
    creator._storage.create_new_study(creator._optuna.create_study().directions, "study")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            study = creator._storage.get_study_id_from_name("study")
            creator._storage.set_study_user_attr(study, "plan", comparisons.make(metric="loss").to_dict())

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


def test_a_short_outage_of_the_database_does_not_end_a_run(url, monkeypatch):
    from optuna.exceptions import StorageInternalError

    plan = comparisons.make()
    board = board_of(url, plan)
    claim = board.take([plan.due({})[0].key])

    def unreachable(trial):
        raise StorageInternalError("no connection")

    monkeypatch.setattr(board._storage, "record_heartbeat", unreachable)
    board._seen -= 50
    board.sign_of_life(claim)
    board._seen -= 20
    with (
        pytest.raises(TrainingError, match=r"does not answer .*; the same command goes on where this ended"),
        board.reachable(),
    ):
        board.sign_of_life(claim)


def test_a_study_of_something_else_is_left_alone(url, monkeypatch):
    import optuna

    monkeypatch.setattr("peft_modal.comparison.storage.time.sleep", lambda seconds: None)
    optuna.create_study(storage=url, study_name="study").add_trial(optuna.create_trial(value=1.0))

    with pytest.raises(ConfigError, match="is a study of something else; choose another --study"):
        board_of(url, comparisons.make())


def test_costs_that_failed_for_one_method_are_a_failure_and_are_measured_again_when_asked(url):
    plan = comparisons.make(cost_rounds=1)
    board = board_of(url, plan)

    def without(run, tick):
        costs = {"lora": {"error": "out of memory"}, "full": {"error": None}}
        return costs if run.key == COST else {"val/accuracy": 0.5}

    progress = work(plan, board, without, publish=lambda _: None)
    assert [(run.key, reason) for run, reason in failures(plan, progress)] == [(COST, "lora: out of memory")]
    board.retry([COST])

    keys = []
    work(plan, board, executor(keys), publish=lambda _: None)
    assert keys == [COST]
