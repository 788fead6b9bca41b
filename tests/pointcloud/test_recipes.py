"""The papers' recipes run as shipped, but for the size of the network and of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cloud_benchmarks import write_modelnet_fewshot, write_modelnet_pickles, write_scanobjectnn

from peft_modal.__main__ import main
from peft_modal.api import build
from peft_modal.compose import compose

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
PAPERS = sorted(path for path in FOLDER.glob("*.yaml") if "name: point_mae" in path.read_text(encoding="utf-8"))
OURS = [path for path in PAPERS if path.stem.startswith(("scanobjectnn_", "modelnet"))]
SMALL = [
    "--backbone.weights=random", "--backbone.dim=24", "--backbone.depth=12", "--backbone.num_heads=3",
    "--backbone.num_group=24", "--backbone.group_size=8", "--backbone.pointnet_dims=[8, 16, 16]", "--data.batch_size=4",
]  # fmt: skip
SMALL_METHODS = {"pointgst": ["--method.local=8"], "peft": ["--method.feature_groups=12"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmarks in the folders that the recipes name, with a handful of clouds each."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_scanobjectnn(root / "ScanObjectNN", train=8, test=4)
    write_modelnet_pickles(root / "ModelNet", {"train": range(8), "test": range(4)}, points=1300)
    write_modelnet_fewshot(root / "ModelNetFewshot" / "5way_10shot", points=1024)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    small = [*SMALL, *SMALL_METHODS.get(path.stem.rpartition("_")[2], ())]
    assert main(["fit", "--config", path.name, *small, "--trainer.fast_dev_run=true", "--out", str(out)]) == 0
    assert (out / "adapter.safetensors").is_file()


COUNTS = {
    "scanobjectnn_bg_idpt": 1_500_175, "scanobjectnn_only_idpt": 1_696_783, "scanobjectnn_hardest_idpt": 1_696_783,
    "modelnet40_idpt": 1_703_208, "modelnet_fewshot_idpt": 1_703_208, "scanobjectnn_bg_full": 22_093_327,
    "scanobjectnn_only_full": 22_093_327, "scanobjectnn_hardest_full": 22_093_327, "modelnet40_full": 22_099_752,
    "modelnet_fewshot_full": 22_099_752, "scanobjectnn_bg_pointgst": 622_831, "scanobjectnn_only_pointgst": 622_831,
    "scanobjectnn_hardest_pointgst": 622_831, "modelnet40_pointgst": 629_256,
    "scanobjectnn_hardest_point_peft": 710_749, "modelnet40_point_peft": 710_749 + 25 * 257,
}  # fmt: skip


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_recipes_train_as_many_parameters_as_the_papers_count(path: Path) -> None:
    composed = compose(path, overrides=["backbone.weights=random"])
    data = composed.nodes["data"]
    names = data.cls.class_names_without_data(data.kwargs)  # type: ignore[attr-defined]
    task = build(composed, names).task()
    assert sum(parameter.numel() for parameter in task.named_trained().values()) == COUNTS[path.stem]


def test_recipes_are_those_of_the_cards() -> None:
    assert {path.stem for path in OURS} == set(COUNTS)
    for path in OURS:
        nodes = compose(path).nodes
        backbone, task, data = (nodes[noun].kwargs for noun in ("backbone", "task", "data"))
        assert backbone["num_group"] == {2048: 128, 1024: 64}[data["num_points"]]
        assert backbone["frozen_mode"] == "reference"
        assert (task["lr"], task["weight_decay"], task["clip_norm"]) == (5e-4, 0.05, 10.0)
        assert task["clip_scope"] == ("all" if nodes["method"].name == "idpt" else "trainable")
        is_scan, method = path.stem.startswith("scan"), nodes["method"].name
        scans = {"idpt": "rotate", "point_peft": ["narrow_scale", "batch_rotate"]}.get(method, "scale_translate")
        assert data["augment"] == (scans if is_scan else "scale_translate")
        assert (data["batch_size"], data["val_share"]) == (32, 0.0)
        assert data["normalize"] == ("none" if is_scan else "unit")
