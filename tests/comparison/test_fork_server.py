"""Runs forked from a process that has imported what they need."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_modal.comparison.fork_server import ForkServer
from peft_modal.errors import TrainingError

HELPER = """
import os, sys, time
loaded_in = os.getpid()

def handler(options):
    from pathlib import Path
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pids").write_text(f"{loaded_in} {os.getpid()} {os.getppid()}")
    print("out", folder.name)
    print("err", folder.name, file=sys.stderr)
    if folder.name == "waits":
        time.sleep(120)
    if folder.name == "killed":
        os.kill(os.getpid(), 9)
    if folder.name == "server_killed":
        os.kill(os.getppid(), 9)
        time.sleep(120)
    if folder.name == "wrong":
        from peft_modal.errors import ConfigError
        raise ConfigError("lr: nothing can be learnt with this")
    return 0

import peft_modal.cli.main as main_module
main_module.handler_of = lambda verb: "helper_of_forks:handler"
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """A server whose `fit` says which processes it runs in."""
    (tmp_path / "helper_of_forks.py").write_text(HELPER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with ForkServer(["no_such_module", "helper_of_forks"]) as one:
        yield one


def make(server: ForkServer, folder: Path, *, tick_s: float = 30, tick=lambda: None) -> tuple[int, int, int]:
    server.run(["fit", "--config", "x", "--out", str(folder)], log=folder / "log.txt", tick_s=tick_s, tick=tick)
    return pids(folder)


def pids(folder: Path) -> tuple[int, int, int]:
    first, second, third = map(int, (folder / "pids").read_text().split())
    return first, second, third


def ended(process: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_runs_share_what_the_server_has_imported_and_have_logs_of_their_own(server: ForkServer, tmp_path: Path) -> None:
    first, second = make(server, tmp_path / "a"), make(server, tmp_path / "b")
    assert first[0] == second[0] == first[2] == second[2]
    assert len({first[0], first[1], second[1]}) == 3
    assert sorted((tmp_path / "b" / "log.txt").read_text().splitlines()) == ["err b", "out b"]


def test_a_run_fails_with_its_own_sentence_and_the_next_one_goes_on(server: ForkServer, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing can be learnt with this"):
        make(server, tmp_path / "wrong")
    with pytest.raises(TrainingError, match="ended by SIGKILL, perhaps for want of memory"):
        make(server, tmp_path / "killed")
    make(server, tmp_path / "right")


def test_a_run_that_is_given_up_does_not_outlive_it(server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / "waits"

    def tick() -> None:
        if (folder / "pids").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(server, folder, tick_s=0.1, tick=tick)
    assert all(ended(process) for process in pids(folder))
    make(server, tmp_path / "right")  # by a new server


def test_a_server_that_is_killed_is_noticed_and_replaced(server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / "server_killed"
    with pytest.raises(TrainingError, match="ended by SIGKILL"):
        make(server, folder)
    assert ended(pids(folder)[1])
    make(server, tmp_path / "right")


def test_a_run_ends_when_its_worker_is_killed(tmp_path: Path) -> None:
    (tmp_path / "helper_of_forks.py").write_text(HELPER)
    folder = tmp_path / "waits"
    worker = subprocess.Popen(
        [sys.executable, "-c", (
            "import sys\nfrom pathlib import Path\nfrom peft_modal.comparison.fork_server import ForkServer\n"
            "folder = Path(sys.argv[1])\nForkServer(['helper_of_forks']).run(['fit', '--config', 'x', '--out', "
            "str(folder)], log=folder / 'log.txt', tick_s=30, tick=lambda: None)"
        ), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    while not (folder / "pids").is_file() or len((folder / "pids").read_text().split()) < 3:
        assert worker.poll() is None
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    assert all(ended(process) for process in pids(folder))
    assert "Traceback" not in (folder / "log.txt").read_text()
