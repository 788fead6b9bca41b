"""Adapters are loaded, and predict on files of one's own."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from point_cloud_runs import SHORT, TINY_BACKBONE

import peft_modal
from peft_modal.cli.main import main
from peft_modal.errors import BackboneMismatchError


def write_folder(root, classes=("ball", "box"), count=6):
    generator = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            mesh = trimesh.creation.icosphere(2) if label == 0 else trimesh.creation.box((1, 1, 1 + 0.1 * i))
            points = mesh.sample(300, seed=i) + generator.normal(scale=0.01, size=(300, 3))
            path = root / name / f"{i}"
            match i % 6:
                case 0:
                    mesh.export(path.with_suffix(".ply"))
                case 1:
                    mesh.export(path.with_suffix(".off"))
                case 2:
                    np.save(path.with_suffix(".npy"), points)
                case 3:
                    np.savetxt(path.with_suffix(".txt"), points)
                case 4:
                    mesh.export(path.with_suffix(".obj"))
                case _:
                    np.savetxt(path.with_suffix(".xyz"), points)


def test_a_loaded_model_is_in_evaluation_mode_and_repeats_itself(run):
    model = peft_modal.load(run / "adapter.safetensors")
    batch = model.backbone.example_batch()

    assert not [m for part in (model.backbone, model.adapter, model.head) for m in part.modules() if m.training]
    assert torch.equal(model(batch), model(batch))
    assert torch.equal(model(batch), peft_modal.load(run / "adapter.safetensors")(batch))


def test_own_files_train_and_are_predicted(tmp_path):
    write_folder(tmp_path / "mine")
    arguments = [*TINY_BACKBONE, *SHORT, "--method.k=8", "--data=folder", "--data.root=mine", "--data.num_points=128",
                 "--data.batch_size=8"]  # fmt: skip

    assert main(["fit", "--config", "pointcloud_idpt.yaml", *arguments, "--out", "run"]) == 0
    code = main(["predict", "--adapter", "run/adapter.safetensors", "--input", "mine", "--out", "predictions"])

    assert code == 0
    rows = json.loads(Path("predictions/predictions.json").read_text())
    assert {Path(row["path"]).resolve() for row in rows} == {p for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    assert len(rows) == 12
    for row in rows:
        assert row["class"] in {"ball", "box"}
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    with Path("predictions/predictions.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0] == ["path", "class", "ball", "box"]
    assert [[p, c, float(ball), float(box)] for p, c, ball, box in table[1:]] == [
        [row["path"], row["class"], row["probabilities"]["ball"], row["probabilities"]["box"]] for row in rows
    ]

    one = rows[7]
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", one["path"], "--out", "one"]) == 0
    (alone,) = json.loads(Path("one/predictions.json").read_text())
    assert alone["path"] == one["path"]
    assert alone["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)


def test_predicting_on_nothing_ends_in_a_sentence(run, capsys):
    Path("empty").mkdir()
    for path, sentence in {"empty": "found no files at all", "nowhere": "does not exist"}.items():
        assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", path, "--out", "out"]) == 2
        assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_adapter_refuses_another_backbone(run, tmp_path):
    from peft_modal.files import load_adapter, save_adapter

    tensors, header = load_adapter(run / "adapter.safetensors")
    header.config["backbone"]["init_seed"] = 7
    save_adapter(tmp_path / "other.safetensors", tensors, header)

    with pytest.raises(BackboneMismatchError, match="fingerprint"):
        peft_modal.load(tmp_path / "other.safetensors")
