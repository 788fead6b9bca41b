"""The papers' recipes of part segmentation run as shipped, but for the size of the network and of the clouds."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapenet_trees import write_shapenet

from peft_modal.__main__ import main
from peft_modal.compose import compose

PAPERS = Path(__file__).parents[2] / "configs" / "papers"


@pytest.mark.parametrize("name", ["shapenetpart_full", "shapenetpart_idpt"])
def test_every_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shapenet(tmp_path / "shapenet", count=8)
    small = {
        "weights": "random", "dim": 24, "depth": 3, "num_heads": 3, "num_group": 8, "group_size": 4,
        "pointnet_dims": "[8,16,16]",
    }  # fmt: skip
    backbone = [f"--backbone.{key}={value}" for key, value in small.items()]
    head = ["--head.propagation_dims=[16,16]", "--head.hidden_dims=[16,8]"]
    data = ["--data.root=shapenet", "--data.num_points=32", "--data.batch_size=4"]
    trainer = ["--trainer.fast_dev_run=true", "--out", "run"]
    assert main(["fit", "--config", f"{name}.yaml", *backbone, *head, *data, *trainer]) == 0
    assert Path("run/adapter.safetensors").is_file()


def test_recipes_are_those_of_the_papers() -> None:
    for name, augment in (("full", ["scale", "shift"]), ("idpt", ["batch_scale_translate", "shift"])):
        nodes = compose(PAPERS / f"shapenetpart_{name}.yaml").nodes
        assert nodes["task"].kwargs["double_step"] is True
        assert nodes["task"].kwargs["lr"] == pytest.approx(2e-4)
        assert nodes["data"].kwargs["augment"] == augment
        assert nodes["data"].kwargs["train_on"] == "trainval"
        assert nodes["backbone"].kwargs["frozen_mode"] == "reference"


def test_the_shipped_configuration_runs_on_embedded_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    trainer = ["--trainer.fast_dev_run=true", "--out", "run"]
    assert main(["fit", "--config", "pointcloud_segmentation.yaml", *trainer]) == 0
