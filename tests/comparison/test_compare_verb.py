"""`compare` through the command line, with real runs at toy size."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import comparisons
import pytest

from peft_modal.cli.compare import publish
from peft_modal.cli.main import main
from peft_modal.comparison.manifest import Manifest
from peft_modal.comparison.plan import COST, Progress

TINY = [
    "--backbone.weights=random", "--backbone.init=torch", "--backbone.dim=24", "--backbone.depth=2",
    "--backbone.num_heads=3", "--backbone.num_group=16", "--backbone.group_size=8",
    "--backbone.pointnet_dims=[8,16,16]", "--data.shots=4", "--data.val_per_class=2", "--data.test_per_class=2",
    "--data.num_points=128", "--data.pool_points=160", "--data.batch_size=16", "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
]  # fmt: skip
CONFIG = ["compare", "--config", "pointcloud_bench.yaml"]


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def compare(*arguments, **options):
    command = [sys.executable, "-m", "peft_modal", *CONFIG, "--out", "out", *arguments, *TINY]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def manifest():
    return json.loads(Path("out/manifest.json").read_text())


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_comparison_killed_in_a_run_goes_on_and_gives_one_table(capsys):
    arguments = ["--methods", "lora(rank=2),linear_probe", "--seeds", "1", "--lr-grid", "1,1e5", "--cost-rounds", "1"]
    first = compare(*arguments)
    while not list(Path().glob("out/runs/*/lr*/seed0/metrics.csv")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    assert main([*CONFIG, "--out", "out", *arguments, *TINY]) == 0
    error = capsys.readouterr().err
    assert "[1/5] lora(rank=2), lr 0.001, seed 0" in error
    assert "waiting" not in error

    table = list(csv.DictReader(io.StringIO(Path("out/table.csv").read_text())))
    assert [row["method"] for row in table] == ["lora(rank=2)", "linear_probe"]
    assert all(float(row[name]) > 0 for row in table for name in ("trained", "adapter_bytes", "step_ms", "step_ratio",
                                                                  "peak_mb", "peak_ratio"))  # fmt: skip
    assert float(table[1]["trained"]) == (2 * 24 + 1) * 12 + 2 * 24  # the head, the class token and its position
    runs = {run["key"]: run for run in manifest()["runs"]}
    assert len(runs) == 5
    assert all(run["state"] == "done" for run in runs.values())
    for key, run in runs.items():
        if key != "cost":
            assert json.loads(Path("out", key, "metrics.json").read_text()) == run["figures"]
            assert Path("out", key, "adapter.safetensors").is_file()
    before = {name: Path("out", name).read_bytes() for name in ("table.csv", "table.md", "table.html", "plot.svg")}

    # Nothing is made again by the same command, and the table alone needs no training.
    assert main([*CONFIG, "--out", "out", *arguments, *TINY]) == 0
    assert main(["compare", "--out", "out"]) == 0
    assert "[" not in capsys.readouterr().err
    assert {name: Path("out", name).read_bytes() for name in before} == before

    # Costs can be measured again.
    assert main([*CONFIG, "--out", "out", *arguments, *TINY, "--remeasure"]) == 0
    remade = list(csv.DictReader(io.StringIO(Path("out/table.csv").read_text())))
    assert all(
        row["step_ms"] != old["step_ms"] and row["mean"] == old["mean"] for row, old in zip(remade, table, strict=True)
    )

    # Another comparison in the same folder is refused.
    assert main([*CONFIG, "--out", "out", *arguments, *TINY, "--task.weight_decay=0.5"]) == 2
    assert "is another comparison" in capsys.readouterr().err


def test_a_published_comparison_is_extended_without_its_record(monkeypatch, capsys):
    made = []

    def executor(*_, **__):
        def execute(run, tick):
            made.append(run.key)
            return comparisons.done(val=0.5, test=0.5).figures

        return execute

    monkeypatch.setattr("peft_modal.cli.compare.Executor", executor)
    arguments = [*CONFIG, "--out", "out", "--seeds", "1", "--lr-grid", "1", "--cost-rounds", "0", *TINY]
    assert main([*arguments, "--methods", "lora"]) == 0
    Path("out/comparison.db").unlink()
    made.clear()

    assert main([*arguments, "--methods", "linear_probe,lora"]) == 0
    assert made == ["runs/linear_probe/lr0.001/seed0"]
    table = csv.DictReader(io.StringIO(Path("out/table.csv").read_text()))
    assert [row["method"] for row in table] == ["linear_probe", "lora"]

    Path("out/comparison.db").unlink()
    assert main([*arguments, "--methods", "lora", "--task.weight_decay=0.5"]) == 2
    assert "'out' holds another comparison: config.task.weight_decay" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_is_named_and_the_code_is_not_zero(capsys):
    arguments = ["--methods", "linear_probe", "--seeds", "1", "--lr-grid", "1e-33,1", "--cost-rounds", "0"]

    assert main([*CONFIG, "--out", "out", *arguments, *TINY, "--task.lr=1e30"]) == 2

    captured = capsys.readouterr()
    assert "runs/linear_probe/lr1e+30/seed0: the loss is not finite" in captured.err
    assert "1 of 2 runs failed; --retry-failed takes them again" in captured.err
    assert manifest()["choices"]["linear_probe"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare"], "--out"),
        (["compare", "--out", "out"], "holds no comparison"),
        (["compare", "--methods", "lora", "--out", "out"], "--config is missing"),
        ([*CONFIG, "--out", "out"], "--methods is missing: --config would do nothing"),
        ([*CONFIG, "--methods", "lroa", "--out", "out"], "did you mean 'lora'"),
        ([*CONFIG, "--methods", "lora", "--out", "out", "--method.rank=3"], "methods are named in --methods"),
        ([*CONFIG, "--methods", "lora", "--out", "out", "--seeds", "none"], "--seeds"),
        ([*CONFIG, "--methods", "lora", "--out", "out", "--lr-grid", "0"], "--lr-grid"),
        ([*CONFIG, "--methods", "lora", "--out", "out", "--cost-rounds", "-1"], "--cost-rounds: expected 0 or more"),
        ([*CONFIG, "--methods", "lora", "--out", "out", "--cost-rounds", "x"], "--cost-rounds"),
        ([*CONFIG, "--methods", "lora", "--out", "file"], "'file' is a file"),
        ([*CONFIG, "--methods", "lora", "--out", "out", "--storage", "x"], "expected a database's URL"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_code_two(arguments, sentence, capsys):
    Path("file").touch()

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert "bug" not in error


def test_a_child_ends_when_its_worker_does(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'from peft_modal.comparison import child; import time, "
        "threading; threading.Thread(target=child._end_with_parent, daemon=True).start(); time.sleep(600)'],"
        " stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.communicate()

    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert worker.returncode == -signal.SIGKILL
    assert os.getpid() != pid


def test_costs_of_a_published_comparison_are_measured_again(monkeypatch, capsys):
    plan = comparisons.make(seeds=(0,), cost_rounds=3)
    costs = {
        label: {"step_ms": 1.0, "ratio": 2.0, "peak_mb": 3.0, "peak_ratio": 4.0, "error": None}
        for label in plan.methods
    }
    progress = {**comparisons.complete(plan), COST: Progress("done", figures=costs)}
    Path("out").mkdir()
    publish(Path("out"), Manifest(plan, progress, "compare ...", "study", "comparison.db"), complete=True)
    seen = []

    class Fake:
        def __init__(self, plan, out, *, tick_s):
            seen.append(out)

        def __call__(self, run, tick):
            return {label: {**cost, "ratio": 0.5} for label, cost in costs.items()}

    monkeypatch.setattr("peft_modal.cli.compare.Executor", Fake)
    assert main(["compare", "--out", "out", "--remeasure"]) == 0
    table = list(csv.DictReader(io.StringIO(Path("out/table.csv").read_text())))
    assert [row["step_ratio"] for row in table] == ["0.5"] * len(plan.methods)
    assert seen[0] != Path("out")  # nothing of the measurement is left beside the table
    assert manifest()["runs"][0]["figures"] == next(iter(progress.values())).figures

    Path("out/comparison.db").touch()
    assert main(["compare", "--out", "out", "--remeasure"]) == 2
    assert "repeat its command" in capsys.readouterr().err
