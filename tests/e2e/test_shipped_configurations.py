"""Every shipped configuration runs."""

from pathlib import Path

import pytest

from peft_modal.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
# Pre-training generates its whole data set first, which may take minutes.
SHIPPED = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] if "pretrain" in path.stem else [])
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "papers"  # test_*recipes.py of the modalities
]


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def test_the_shipped_configurations_are_found():
    names = [path.name for path in CONFIGS.rglob("*.yaml")]
    shipped = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "papers"]
    assert {"pointcloud_idpt.yaml", "pointcloud_linear_probe.yaml", "pointcloud_pretrain_nano.yaml"} <= set(names)
    assert len(shipped) == len(SHIPPED) > 20
    assert len(names) == len(set(names)), "`--config NAME` finds a file by its name alone"


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_configuration_runs(path):
    if path.stem == "diffusion_pretrain_nano":
        from toy_pipeline import save_toy_pipeline

        save_toy_pipeline(Path("nano-start"))
    assert main(["fit", "--config", path.name, "--trainer.fast_dev_run=true", "--out", "run"]) == 0
    assert Path("run/adapter.safetensors").is_file()
