"""Runs that are killed, disturbed, or have nowhere to write: a clear end, and a repetition that gives the same."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from tiny_runs import ARGUMENTS, measured, metrics_of, tensors_of, write_clouds

from peft_modal.cli.main import main
from peft_modal.files import load_adapter
from peft_modal.running import fit as module
from peft_modal.running.checkpoints import undamaged
from peft_modal.running.history import Table
from peft_modal.running.lock import locked

RUN = ["fit", *ARGUMENTS, "--task.keep=best"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the data and an uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PEFT_MODAL_CACHE", str(root / "cache"))
        write_clouds(root / "good")
        assert main([*RUN, "--out", "run"]) == 0
    return root


@pytest.fixture(autouse=True)
def _workspace(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "good").symlink_to(whole / "good")


def in_child(function, *arguments):
    """Run in a process of its own; its exit code, negative for a signal."""
    child = FORK.Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def kill_me(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


class At(Callback):
    """Does something before the second batch of the third epoch."""

    def __init__(self, action):
        self.action = action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            self.action()


def act_in_epoch(action):
    make = module.make_trainer

    def with_callback(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.callbacks.insert(0, At(action))
        return trainer

    module.make_trainer = with_callback


def in_epoch():
    act_in_epoch(kill_me)


def while_a_checkpoint_is_written(name, times):
    replace, left = Path.replace, [times]

    def replace_or_die(self, target):
        if Path(target).name == name:
            left[0] -= 1
            if not left[0]:
                kill_me()
        return replace(self, target)

    Path.replace = replace_or_die


def before_last():
    while_a_checkpoint_is_written("last.ckpt", 2)


def before_the_first_checkpoint():
    while_a_checkpoint_is_written("last.ckpt", 1)


def before_best():
    while_a_checkpoint_is_written("best.ckpt", 1)


def before_adapter():
    module._save = kill_me


def before_metrics():
    while_a_checkpoint_is_written("metrics.json", 1)


def before_second_adapter():
    while_a_checkpoint_is_written("adapter.safetensors", 2)


def before_row():
    log = Table.log_metrics

    def log_or_die(self, metrics, step=None):
        if "train/loss" in metrics and metrics["epoch"] == 1:
            kill_me()
        log(self, metrics, step)

    Table.log_metrics = log_or_die


def run_and_die(place):
    place()
    os._exit(main([*RUN, "--out", "run"]))


@pytest.mark.parametrize(
    "place",
    [in_epoch, before_the_first_checkpoint, before_best, before_last, before_row, before_adapter,
     before_second_adapter, before_metrics],
)  # fmt: skip
def test_a_killed_run_that_is_repeated_gives_what_an_uninterrupted_one_gives(whole, place):
    assert in_child(run_and_die, place) == -signal.SIGKILL
    assert not Path("run/metrics.json").exists()
    for checkpoint in Path("run/checkpoints").glob("*.ckpt"):
        undamaged(checkpoint)
    if Path("run/adapter.safetensors").exists():
        load_adapter(Path("run/adapter.safetensors"))

    assert main([*RUN, "--out", "run"]) == 0

    assert tensors_of("run") == tensors_of(whole / "run")
    assert measured("run") == measured(whole / "run")
    assert metrics_of("run").keys() == metrics_of(whole / "run").keys()
    assert Path("run/metrics.csv").read_text() == (whole / "run/metrics.csv").read_text()
    assert [path.name for path in Path("run").rglob(".*")] == []


@pytest.mark.slow
def test_a_program_killed_from_outside_goes_on_when_its_command_is_repeated(whole):
    command = [sys.executable, "-m", "peft_modal", *RUN, "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in the uninterrupted run: sums depend on the threads
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if line.startswith("epoch 2"):
                break
        process.kill()

    assert not Path("run/metrics.json").exists()
    assert subprocess.run(command, check=False, capture_output=True, env=environment).returncode == 0
    assert tensors_of("run") == tensors_of(whole / "run")
    assert measured("run") == measured(whole / "run")


def hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(600)


def test_a_folder_in_use_is_refused_and_a_dead_holder_is_no_obstacle(capsys):
    ready = FORK.Event()
    holder = FORK.Process(target=hold, args=(Path("run"), ready))
    holder.start()
    ready.wait()
    try:
        assert main([*RUN, "--out", "run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --out: 'run' is in use by process {holder.pid} on ")
        assert not Path("run/config.yaml").exists()
    finally:
        holder.kill()
        holder.join()

    assert main([*RUN, "--out", "run"]) == 0
    assert not list(Path("run").glob(".*"))


def test_a_mistake_beside_overwrite_deletes_nothing(whole, capsys):
    out = str(whole / "run")
    before = (whole / "run/adapter.safetensors").read_bytes()

    assert main([*RUN, "--out", out, "--overwrite", "--method.rank=0"]) == 2
    assert main([*RUN, "--out", out, "--overwrite", "--data.root=nowhere"]) == 2

    assert (whole / "run/adapter.safetensors").read_bytes() == before


def kill_workers():
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def test_a_killed_loader_worker_ends_the_run_in_a_sentence(whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_trainer", module.make_trainer)
        act_in_epoch(kill_workers)
        assert main([*RUN, "--out", "run", "--data.num_workers=1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "a process that prepares batches died" in lines[0]

    assert main([*RUN, "--out", "run"]) == 0
    assert tensors_of("run") == tensors_of(whole / "run")


def test_a_broken_file_in_a_worker_ends_in_its_own_sentence(whole, capsys):
    Path("broken").mkdir()
    Path("broken/x.txt").write_text("1 2 nan\n3 4 5\n")
    adapter = str(whole / "run/adapter.safetensors")

    arguments = ["--input", "broken", "--out", "out", "--data.num_workers=1"]
    assert main(["predict", "--adapter", adapter, *arguments]) == 2
    assert capsys.readouterr().err == "error: 'broken/x.txt' has 1 of 2 points with NaN or infinite coordinates.\n"


def with_limit(size, error):
    """A run that may write no file above a size."""
    sys.stderr = Path(error).open("w", encoding="utf-8")  # noqa: SIM115 — the process ends with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code = main([*RUN, "--out", "run"])
    sys.stderr.close()
    os._exit(code)


@pytest.mark.parametrize("size", [200, 6_000])
def test_a_file_that_cannot_be_written_ends_the_run_in_a_sentence(whole, size):
    assert in_child(with_limit, size, "error") == 2

    lines = [line for line in Path("error").read_text().splitlines() if not line.startswith("epoch ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: 'run/")
    assert "cannot be written: File too large" in lines[0]
    assert not [path for path in Path("run").rglob(".*") if path.suffix == ".tmp"]
    assert main([*RUN, "--out", "run"]) == 0
    assert tensors_of("run") == tensors_of(whole / "run")


def mount(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs the rights to")


@pytest.mark.parametrize(
    ("options", "says"), [("size=64k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_disk_that_is_full_or_read_only_ends_the_run_in_a_sentence(capsys, options, says):
    disk = Path("disk").absolute()
    mount(disk, options)
    try:
        assert main([*RUN, "--out", "disk/run"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")]
        assert len(lines) == 1
        assert says in lines[0]
        assert not Path("disk/run/metrics.json").exists()
        for checkpoint in Path("disk/run").rglob("*.ckpt"):
            undamaged(checkpoint)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
