"""The papers' recipes run as shipped, but for the size of the network and of the clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sound_files import write_esc50, write_fluent, write_speech_commands, write_urbansound

from peft_modal.__main__ import main
from peft_modal.compose import compose

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
PAPERS = sorted(path for path in FOLDER.glob("*.yaml") if "name: ast" in path.read_text(encoding="utf-8"))
SIZES = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "mels": 32, "frames": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four benchmarks with a handful of recordings each."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_esc50(root / "ESC-50")
    write_urbansound(root / "UrbanSound8K")
    write_speech_commands(root / "speech_commands_v0.02")
    write_fluent(root / "fluent_speech_commands_dataset")
    return root


def test_the_recipes_are_found() -> None:
    assert len(PAPERS) == 11


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = compose(path).nodes["data"].kwargs["root"]
    small = ["--backbone.weights=random", "--backbone.model=custom", f"--backbone.sizes={json.dumps(SIZES)}"]
    data = [f"--data.root={root / folder}", "--data.mels=32", "--data.seconds=0.6", "--data.batch_size=4"]
    code = main(["fit", "--config", path.name, *small, *data, "--trainer.fast_dev_run=true", "--out", "run"])
    assert code == 0
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
