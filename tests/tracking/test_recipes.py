"""The papers' recipes run as shipped, but for the sizes of network and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tracking_trees import write_got10k

from peft_modal.__main__ import main
from peft_modal.compose import compose

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
PAPERS = sorted(path for path in FOLDER.glob("*.yaml") if "name: lorat" in path.read_text(encoding="utf-8"))
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for i in range(2):
            write_got10k(Path("GOT-10k") / part / f"GOT-10k_{part}_{i}", cover="8888")
    small = [
        "--backbone.weights=random", "--backbone.model=custom", f"--backbone.sizes={json.dumps(SIZES)}",
        "--backbone.template_size=16", "--backbone.search_size=32", "--method.rank=2", "--data.template_size=16",
        "--data.search_size=32", "--data.min_visible=2", "--data.batch_size=2", "--data.num_workers=0",
        "--trainer.precision=32-true",
    ]  # fmt: skip
    assert main(["fit", "--config", path.name, *small, "--trainer.fast_dev_run=true", "--out", "run"]) == 0
    assert Path("run/adapter.safetensors").is_file()


def test_recipes_are_the_cards() -> None:
    assert [path.stem for path in PAPERS] == ["got10k_lorat"]
    nodes = compose(PAPERS[0]).nodes
    assert nodes["backbone"].kwargs["positions"] == "interpolate"
    assert nodes["method"].build().scale == 1.0
    assert not nodes["method"].build().identity_at_init
    assert nodes["head"].kwargs["init_std"] == 0.02
    assert nodes["task"].kwargs["window_penalty"] == 0.45
    data = nodes["data"].kwargs
    assert (data["normalize"], data["search_factor"], data["scale_jitter"], data["shift_jitter"]) == (
        "imagenet", 4.0, 0.25, 3.0,
    )  # fmt: skip
    assert (data["max_gap"], data["min_visible"], data["max_blur"], data["augment"]) == (100, 10.0, 2.0, True)
