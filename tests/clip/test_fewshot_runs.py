"""Whole runs on few-shot sets through the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from coop_trees import SYNSETS, TREES

import peft_modal
from peft_modal.__main__ import main
from peft_modal.methods.lora import LoRA

RUN = [
    "fit", "--config=clip_lora.yaml", "--data=fewshot", "--data.root=DATA", "--data.shots=2", "--data.resolution=32",
    "--data.normalize=half", "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu",
]  # fmt: skip
TEST = ["test", "--adapter=run/adapter.safetensors"]


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def figures(folder: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
    return found


def test_a_run_leaves_its_shots_and_they_can_be_had_again() -> None:
    TREES["eurosat"](Path("DATA"))
    assert main([*RUN, "--data.dataset=eurosat", "--data.seed=3", "--out=run"]) == 0
    record = json.loads(Path("run/data.json").read_text(encoding="utf-8"))
    assert (record["shots"], record["seed"], len(record["train"]), len(record["val"])) == (2, 3, 6, 6)
    assert record["test_pictures"] == 9
    assert len(record["split_sha256"]) == 64
    options = ["--data.dataset=eurosat", "--data.seed=1", "--data.shots_file=run/data.json", "--out=again"]
    assert main([*RUN, *options]) == 0
    again = json.loads(Path("again/data.json").read_text(encoding="utf-8"))
    assert (again["train"], again["val"]) == (record["train"], record["val"])


def test_names_go_into_the_prompt_of_the_set_and_into_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    TREES["eurosat"](Path("DATA"))
    assert main([*RUN, "--data.dataset=eurosat", "--out=run"]) == 0
    task: Any = peft_modal.load("run/adapter.safetensors").task()
    assert task.templates == ("a centered satellite photo of {}.",)
    assert main([*RUN, "--data.dataset=eurosat", '--task.templates=["my {}"]', "--out=own"]) == 0
    task = peft_modal.load("own/adapter.safetensors").task()
    assert task.templates == ("my {}",)
    assert figures("own")["test/loss"] != figures("run")["test/loss"]


def test_an_adapter_is_tested_on_variants_with_their_own_classes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("imagenet", "imagenet_v2", "imagenet_a"):
        TREES[name](Path("DATA"))
    assert main([*RUN, "--data.dataset=imagenet", "--out=run"]) == 0
    assert not any(name.startswith("val/") for name in figures("run"))
    for name in ("imagenet_v2", "imagenet_a"):
        assert main([*TEST, f"--data.dataset={name}", f"--out={name}"]) == 0
        assert 0 <= figures(name)["test/accuracy"] <= 1
    names = list(SYNSETS.values())[1:]
    page = Path("imagenet_a/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    assert "tench" not in page
    capsys.readouterr()
    # A method whose parameters belong to classes is measured on those alone.
    monkeypatch.setattr(LoRA, "is_bound_to_classes", True)
    assert main([*TEST, "--data.dataset=imagenet_a", "--out=bound"]) == 2
    assert "the adapter knows the classes tench, goldfish, great white shark; the data has" in capsys.readouterr().err


def test_base_and_new_are_measured_by_one_run_without_training_too() -> None:
    TREES["oxford_pets"](Path("DATA"))
    options = ["--data.dataset=oxford_pets", "--data.classes=base", "--task.base_to_new=true"]
    assert main([*RUN, *options, "--task.lr=0.0", "--out=run"]) == 0
    found = figures("run")
    assert {"test/accuracy_base", "test/accuracy_new", "test/harmonic_mean"} <= set(found)


def test_halves_that_are_measured_together_are_told(caplog: pytest.LogCaptureFixture) -> None:
    TREES["oxford_pets"](Path("DATA"))
    options = ["--data.dataset=oxford_pets", "--data.classes=base", "--trainer.fast_dev_run=true"]
    with caplog.at_level(logging.WARNING):
        assert main([*RUN, *options, "--task.base_to_new=true", "--out=halves"]) == 0
        assert "task.base_to_new=true" not in caplog.text
        assert main([*RUN, *options, "--out=together"]) == 0
    assert "task.base_to_new=true measures each half among its own names" in caplog.text


def test_the_missing_split_is_said_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    TREES["dtd"](Path("DATA"))
    with caplog.at_level(logging.WARNING):
        assert main([*RUN, "--data.dataset=dtd", "--out=run"]) == 0
    assert "NOT the published one" in caplog.text
    assert json.loads(Path("run/data.json").read_text(encoding="utf-8"))["published"] is False


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data.dataset=stanfordcars"], "data.dataset: 'stanfordcars' is unknown, did you mean 'stanford_cars'"),
        (["--data.dataset=eurosat", "--data.shots=0"], "data.shots: expected"),
        (["--data.dataset=eurosat", "--data.classes=old"], "data.classes: expected"),
        (["--data.dataset=eurosat", "--data.crop_scale=[0.9, 0.5]"], "data.crop_scale: expected two shares above 0"),
        (["--data.dataset=sun397"], "'DATA' has no folder 'sun397'"),
        (["--data.dataset=eurosat", "--task.base_to_new=true"], "set data.classes to base"),
    ],
)
def test_mistakes_are_told_in_a_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    TREES["eurosat"](Path("DATA"))
    assert main([*RUN, *options, "--out=run"]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
