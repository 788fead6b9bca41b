"""`test` and `validate` repeat the figures of a run."""

import json
from pathlib import Path

import pytest
from point_cloud_runs import IDPT
from tiny_runs import metrics_of

from peft_modal.cli.main import main


@pytest.mark.parametrize("mode", ["eval", "reference"])
def test_test_and_validate_give_the_figures_of_the_run(capsys, mode):
    assert main(["fit", *IDPT, f"--backbone.frozen_mode={mode}", "--out", "run"]) == 0
    figures = metrics_of("run")
    for verb, stage in (("test", "test/"), ("validate", "val/")):
        capsys.readouterr()
        assert main([verb, "--adapter", "run/adapter.safetensors", "--json"]) == 0
        measured_again = json.loads(capsys.readouterr().out)
        assert Path(measured_again.pop("out")).parent == Path(f"runs/run-{verb}")
        assert measured_again == {k: v for k, v in figures.items() if k.startswith(stage)}


def test_test_leaves_figures_and_a_report_and_does_not_overwrite_them_unless_asked(run, capsys):
    arguments = ["test", "--adapter", "run/adapter.safetensors", "--task.votes=2", "--out", "measured"]
    capsys.readouterr()

    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "measured/report.html" in out
    assert "measured/metrics.json" in out
    twin = json.loads(Path("measured/report.json").read_text())
    assert twin["metrics"] == metrics_of("measured")
    assert list(twin["sections"]) == ["samples", "classes", "sight", "parameters", "cost", "environment", "reproduce"]
    command = twin["sections"]["reproduce"]["blocks"][0]["text"]
    assert command == "python -m peft_modal test --adapter run/adapter.safetensors --task.votes=2"

    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_test_does_not_write_into_a_training_run(run, capsys):
    before = metrics_of(run)

    assert main(["test", "--adapter", "run/adapter.safetensors", "--out", "run", "--overwrite"]) == 2
    assert "holds a training run" in capsys.readouterr().err
    assert metrics_of(run) == before


def test_a_vote_is_asked_for_in_the_test_and_stands_beside_the_single_view(run, capsys):
    capsys.readouterr()
    arguments = ["--task.votes=3", "--task.vote_repeats=2", "--json"]
    assert main(["test", "--adapter", str(run / "adapter.safetensors"), *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    trained = metrics_of(run)
    assert {name: figures[name] for name in ("test/accuracy", "test/loss")} == {
        name: trained[name] for name in ("test/accuracy", "test/loss")
    }
    assert 0 <= figures["test/accuracy_voted"] <= figures["test/accuracy_voted_best"] <= 1
    assert not any("voted" in name for name in trained)
