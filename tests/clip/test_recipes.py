"""The papers' recipes run as shipped, but for the size of the network and of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from coop_trees import TREES

from peft_modal.__main__ import main
from peft_modal.api import build
from peft_modal.compose import compose

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
PAPERS = sorted(path for path in FOLDER.glob("*.yaml") if "name: open_clip" in path.read_text(encoding="utf-8"))
R_AMT = [path for path in PAPERS if path.stem.startswith("coop_") and "r_amt" in path.stem]
SMALL = [
    "--backbone.weights=nano", "--backbone.model=null", "--data.resolution=32", "--data.normalize=half",
    "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
]  # fmt: skip
RECIPES = {
    "coop_r_amt": ("eurosat", 0.3, 8e-5, 30, "all"),
    "coop_r_amt_imagenet": ("imagenet", 1.0, 3e-5, 10, "all"),
    "coop_base_to_new_r_amt": ("eurosat", 1.0, 8e-5, 30, "base"),
    "coop_base_to_new_r_amt_imagenet": ("imagenet", 1.0, 3e-5, 10, "base"),
}


def test_recipes_are_those_of_the_paper() -> None:
    assert {path.stem for path in R_AMT} == set(RECIPES)
    for path in R_AMT:
        dataset, gate, lr, epochs, classes = RECIPES[path.stem]
        composed = compose(path)
        backbone, method, task, data = (composed.nodes[n].kwargs for n in ("backbone", "method", "task", "data"))
        assert (backbone["model"], backbone["weights"]) == ("ViT-B-16", "openai")
        assert (method["gate_strength"], task["lr"], composed.trainer["max_epochs"]) == (gate, lr, epochs)
        assert (task["weight_decay"], task["warmup_share"], task["clip_norm"]) == (0, 0, None)
        assert (data["dataset"], data["shots"], data["batch_size"], data["classes"]) == (dataset, 16, 32, classes)
        assert (list(data["crop_scale"]), data["augment"]) == ([0.5, 1.0], ["resized_crop", "flip"])
        assert (data["normalize"], data["resize"], data["resolution"]) == ("clip", "fit", 224)
        assert task["base_to_new"] == (classes == "base")


@pytest.mark.slow
def test_as_many_masks_are_trained_as_the_paper_counts() -> None:
    composed = compose(FOLDER / "coop_r_amt.yaml", overrides=["backbone.weights=random"])
    task = build(composed, ("a", "b")).task()
    assert sum(parameter.numel() for parameter in task.named_trained().values()) == 28_901_376


@pytest.mark.slow
@pytest.mark.parametrize("path", R_AMT, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With the data in the folder that the recipe names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    root = compose(path).nodes["data"].kwargs["root"]
    TREES[RECIPES[path.stem][0]](tmp_path / root)
    assert main(["fit", "--config", path.name, *SMALL, "--out", "run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    wanted = {"test/accuracy"} | ({"test/harmonic_mean"} if RECIPES[path.stem][4] == "base" else set())
    assert wanted <= set(figures)
    record = json.loads(Path("run/data.json").read_text(encoding="utf-8"))
    assert record["dataset"] == RECIPES[path.stem][0]
