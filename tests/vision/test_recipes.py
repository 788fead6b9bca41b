"""The papers' recipes run as shipped, but for the size of the network and of the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from peft_modal.__main__ import main
from peft_modal.compose import compose

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
PAPERS = sorted(path for path in FOLDER.glob("*.yaml") if "name: vit" in path.read_text(encoding="utf-8"))
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three benchmarks with a handful of pictures each."""
    root = tmp_path_factory.mktemp("benchmarks")
    for task in ("cifar", "dtd"):
        for part in ("train800", "val200", "train800val200", "test"):
            lines = []
            for i in range(8):
                picture(root / "vtab-1k" / task / "images" / part / f"{i:06d}.jpg", i)
                lines.append(f"images/{part}/{i:06d}.jpg {i}\n")
            (root / "vtab-1k" / task / f"{part}.txt").write_text("".join(lines), encoding="utf-8")
    cub = root / "fgvc" / "CUB_200_2011"
    for part in ("train", "val", "test"):
        named = {f"{part}/{i}.png": i for i in range(8)}
        for name, seed in named.items():
            picture(cub / "images" / name, seed)
        (cub / f"{part}.json").write_text(json.dumps(named), encoding="utf-8")
    food = root / "fewshot" / "food101"
    (food / "annotations").mkdir(parents=True)
    for i in range(8):
        picture(food / "images" / f"{i}.png", i)
    text = "".join(f"{i}.png {i}\n" for i in range(8))
    for name in ("train_meta.list.num_shot_16.seed_0", "val_meta.list", "test_meta.list"):
        (food / "annotations" / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = compose(path).nodes["data"].kwargs["root"]
    small = ["--backbone.weights=random", "--backbone.model=custom", f"--backbone.sizes={json.dumps(SIZES)}"]
    data = [f"--data.root={root / folder}", "--data.resolution=32", "--data.batch_size=4"]
    code = main(["fit", "--config", path.name, *small, *data, "--trainer.fast_dev_run=true", "--out", "run"])
    assert code == 0
    assert Path("run/adapter.safetensors").is_file()


def test_recipes_name_what_their_papers_were_tuned_on() -> None:
    assert len(PAPERS) == 16
    for path in PAPERS:
        nodes = compose(path).nodes
        assert nodes["backbone"].kwargs["model"] == "vit_base_patch16_224"
        assert nodes["backbone"].kwargs["weights"] in {"ViT-B_16.npz", "augreg_in21k"}
        assert nodes["data"].kwargs["normalize"] == {"ssf": "half", "bi_adaptformer": "none", "bi_lora": "none"}.get(
            nodes["method"].name, "imagenet"
        )
