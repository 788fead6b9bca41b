"""Whole runs through the command line, at toy size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from lightning.pytorch import Callback
from safetensors import safe_open
from tiny_runs import InterruptInEpoch

import peft_modal
from peft_modal.cli.main import main
from peft_modal.errors import BackboneMismatchError, WeightsError

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_BACKBONE = [
    "--backbone.weights=random", "--backbone.init=torch", "--backbone.dim=24", "--backbone.depth=2",
    "--backbone.num_heads=3", "--backbone.num_group=16", "--backbone.group_size=8",
    "--backbone.pointnet_dims=[8,16,16]",
]  # fmt: skip
TINY_DATA = [
    "--data.shots=4", "--data.val_per_class=2", "--data.test_per_class=2", "--data.num_points=128",
    "--data.pool_points=160", "--data.batch_size=16",
]  # fmt: skip
SHORT = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=1"]
IDPT = ["--config", "pointcloud_idpt.yaml", *TINY_BACKBONE, *TINY_DATA, *SHORT, "--method.k=8"]

PRETRAIN = [
    "--config", "pointcloud_pretrain_nano.yaml", *TINY_BACKBONE, *SHORT, "--data.per_family=2", "--data.num_points=128",
    "--data.pool_points=128", "--data.batch_size=16", "--head.num_heads=3", "--head.group_size=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def metrics_of(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def measured(folder):
    """Figures that do not depend on the machine's mood."""
    return {k: v for k, v in metrics_of(folder).items() if not k.startswith(("time/", "memory/", "file/"))}


@pytest.fixture
def run(tmp_path):
    assert main(["fit", *IDPT, "--out", "run"]) == 0
    return tmp_path / "run"


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


def test_fit_leaves_an_adapter_its_configuration_and_its_figures(run):
    figures = metrics_of(run)

    assert {"test/accuracy", "test/mean_class_accuracy", "val/accuracy", "params/adapter", "params/backbone_trained",
            "params/head", "params/total", "time/step_ms", "memory/peak_mb"} <= set(figures)  # fmt: skip
    assert figures["params/adapter"] == 9 * 24**2 + 8 * 24
    assert figures["params/backbone_trained"] == 2 * 24
    for name in ("adapter.safetensors", "config.yaml", "metrics.csv", "checkpoints/last.ckpt"):
        assert (run / name).is_file()


def test_fit_leaves_a_report_with_curves_samples_classes_and_parameters(run):
    twin = json.loads((run / "report.json").read_text())
    page = (run / "report.html").read_text()

    assert list(twin["sections"]) == [
        "curves", "samples", "classes", "parameters", "cost", "environment", "reproduce",
    ]  # fmt: skip
    assert twin["metrics"] == metrics_of(run)
    assert twin["problems"] == []
    loss, *_ = twin["sections"]["curves"]["blocks"][0]["blocks"]
    assert {name: len(points) for name, points in loss["data"]["series"].items()} == {"training": 3, "validation": 3}
    tiles = [tile for gallery in twin["sections"]["samples"]["blocks"] for tile in gallery["tiles"]]
    assert page.count("data:image/png;base64,") == len(tiles) > 0
    (summary, *_) = twin["sections"]["parameters"]["blocks"]
    figures = metrics_of(run)
    assert [(row[0], row[2]) for row in summary["rows"]] == [
        ("Adapter", figures["params/adapter"]),
        ("Backbone tensors", figures["params/backbone_trained"]),
        ("Head", figures["params/head"]),
    ]


def test_the_command_in_the_report_repeats_the_run(run):
    command = json.loads((run / "report.json").read_text())["sections"]["reproduce"]["blocks"][0]["text"]
    program, *arguments = command.split(" peft_modal ")

    assert program == "python -m"
    assert main(arguments[0].split()) == 0
    assert measured("run-again") == measured(run)


def test_a_report_that_fails_costs_nothing_else(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("out of ink")

    monkeypatch.setattr("peft_modal.running.report.write_report", broken)

    assert main(["fit", *IDPT, "--out", "run"]) == 0
    assert "warning: there is no report: RuntimeError: out of ink" in capsys.readouterr().err
    assert "test/accuracy" in metrics_of("run")
    assert not Path("run/report.html").exists()


def test_a_run_that_ends_within_its_report_is_not_finished(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_modal.running.report.write_report", interrupted)
        assert main(["fit", *IDPT, "--out", "stopped"]) == 130

    assert not Path("stopped/metrics.json").exists()
    assert main(["fit", *IDPT, "--out", "stopped"]) == 0
    assert Path("stopped/report.html").is_file()
    assert measured("stopped").items() <= measured(run).items()
    assert "test/accuracy" in measured("stopped")


def test_a_checkpoint_holds_no_frozen_tensor(run):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 — our own file
    frozen = peft_modal.load(run / "adapter.safetensors").backbone.network.state_dict()

    assert {name for name in state if name.startswith("backbone.")} == {"backbone.cls_token", "backbone.cls_pos"}
    assert not [name for name in state if name in frozen]


def test_a_loaded_model_is_in_evaluation_mode_and_repeats_itself(run):
    model = peft_modal.load(run / "adapter.safetensors")
    batch = model.backbone.example_batch()

    assert not [m for part in (model.backbone, model.adapter, model.head) for m in part.modules() if m.training]
    assert torch.equal(model(batch), model(batch))
    assert torch.equal(model(batch), peft_modal.load(run / "adapter.safetensors")(batch))


def test_the_written_configuration_repeats_the_run(run):
    assert main(["fit", "--config", "run/config.yaml", "--out", "again"]) == 0
    assert measured("again") == measured(run)


def test_a_finished_run_is_not_overwritten_unless_asked(run, capsys):
    before = (run / "adapter.safetensors").read_bytes()

    assert main(["fit", *IDPT, "--out", "run"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run / "adapter.safetensors").read_bytes() == before
    assert main(["fit", *IDPT, "--out", "run", "--overwrite"]) == 0


class InterruptAtEpoch(Callback):
    """Ctrl-C at the start of the third epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


class InterruptAfterValidation(Callback):
    """Ctrl-C when the third epoch's figures are logged and its checkpoint is not yet written."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


class InterruptInFirst(Callback):
    """Ctrl-C before the second batch of the run, when there is no checkpoint yet."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            raise KeyboardInterrupt


class Poison(Callback):
    """NaN in the head's weights from the third epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            with torch.no_grad():
                next(pl_module.head.parameters()).fill_(float("nan"))


def fit_with(callback, arguments, monkeypatch):
    """The code that `fit` ends with when a callback of the test comes first."""
    from peft_modal.running import fit as module

    make = module.make_trainer

    def with_callback(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.callbacks.insert(0, callback)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_trainer", with_callback)
        return main(["fit", *arguments])


@pytest.mark.parametrize(
    ("interrupt", "goes_on_at"),
    [(InterruptAtEpoch, 3), (InterruptInEpoch, 3), (InterruptAfterValidation, 3), (InterruptInFirst, 1)],
)
def test_an_interrupted_run_that_goes_on_gives_what_an_uninterrupted_one_gives(
    run, monkeypatch, capsys, interrupt, goes_on_at
):
    assert fit_with(interrupt(), [*IDPT, "--out", "stopped"], monkeypatch) == 130
    assert not Path("stopped/metrics.json").exists()
    capsys.readouterr()
    assert main(["fit", *IDPT, "--out", "stopped"]) == 0

    epochs = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert epochs == [f"{epoch}/3" for epoch in range(goes_on_at, 4)]
    assert measured("stopped") == measured(run)
    assert Path("stopped/metrics.csv").read_text() == (run / "metrics.csv").read_text()


@pytest.mark.parametrize("arguments", [[*IDPT, "--backbone.frozen_mode=reference"], PRETRAIN], ids=["drift", "masked"])
def test_statistics_drop_path_and_masks_go_on_where_they_stopped(monkeypatch, arguments):
    assert main(["fit", *arguments, "--out", "run"]) == 0
    assert fit_with(InterruptInEpoch(), [*arguments, "--out", "stopped"], monkeypatch) == 130
    assert main(["fit", *arguments, "--out", "stopped"]) == 0

    assert measured("stopped") == measured("run")


def test_a_loss_that_is_not_finite_keeps_what_was_saved(run, monkeypatch, capsys):
    assert fit_with(Poison(), [*IDPT, "--out", "stopped"], monkeypatch) == 2
    assert "not finite at epoch 2" in capsys.readouterr().err
    assert not Path("stopped/metrics.json").exists()
    assert main(["fit", *IDPT, "--out", "stopped"]) == 0

    assert measured("stopped") == measured(run)


@pytest.mark.parametrize("damage", ["random", "truncated", "flipped", "headers"])
def test_a_damaged_checkpoint_ends_in_a_sentence(run, capsys, damage):
    checkpoint = run / "checkpoints/last.ckpt"
    whole = checkpoint.read_bytes()
    middle = len(whole) // 2
    disk = whole.rindex(b"PK\6\6") + 16  # zipfile does not look at it, torch does
    contents = {
        "random": b"garbage!",
        "headers": whole[:disk] + bytes([whole[disk] ^ 2]) + whole[disk + 1 :],
        "truncated": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    checkpoint.write_bytes(contents[damage])
    (run / "metrics.json").unlink()

    assert main(["fit", *IDPT, "--out", "run"]) == 2
    assert "last.ckpt' is damaged; delete it" in capsys.readouterr().err


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
    assert list(twin["sections"]) == ["samples", "classes", "parameters", "cost", "environment", "reproduce"]
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


@pytest.mark.parametrize("method", ["lora", "ssf", "bitfit", "full"])
def test_merged_weights_give_the_adapters_features_within_the_printed_deviation(method, capsys):
    assert main(["fit", *IDPT[:-1], f"--method={method}", "--trainer.max_epochs=1", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    from peft_modal_pointcloud.backbone import PointMAEBackbone

    model = peft_modal.load("run/adapter.safetensors")
    arguments = {key: value for key, value in printed["backbone"].items() if key != "name"}
    merged = PointMAEBackbone(**arguments)
    merged.load_weights()
    batch = merged.example_batch(8)
    with torch.no_grad():
        adapted, plain = model.backbone(batch).tokens.double(), merged(batch).tokens.double()
    off = float((adapted - plain).abs().max())
    assert off == pytest.approx(printed["deviation"]["features"], rel=1e-6)
    assert printed["deviation"]["features_relative"] == pytest.approx(off / float(adapted.abs().max()), rel=1e-6)
    assert off < 2e-5
    assert 0 <= printed["deviation"]["weights"] < 1e-6


def test_a_merged_adapter_goes_on_predicting_with_its_head(capsys):
    assert main(["fit", *IDPT[:-1], "--method=lora", "--out", "run"]) == 0
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "predict --adapter merged.head.safetensors" in shown
    assert "--backbone.weights=merged.safetensors --backbone.dim=24" in shown

    adapted, merged = (peft_modal.load(f) for f in ("run/adapter.safetensors", "merged.head.safetensors"))
    assert merged.class_names == adapted.class_names
    assert merged.header.preprocessing == adapted.header.preprocessing
    assert not merged.adapter.counts()["adapter"]
    batch = merged.backbone.example_batch(4)
    torch.testing.assert_close(merged(batch), adapted(batch), atol=1e-5, rtol=1e-5)

    Path("merged.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"merged\.safetensors"):
        peft_modal.load("merged.head.safetensors")


def test_the_deviation_tells_of_the_cast(capsys):
    assert main(["fit", *IDPT[:-1], "--method=lora", "--trainer.max_epochs=1", "--out", "run"]) == 0
    capsys.readouterr()
    deviation = {}
    for dtype in ("float32", "bfloat16"):
        out = f"{dtype}.safetensors"
        assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", out, "--dtype", dtype, "--json"]) == 0
        deviation[dtype] = json.loads(capsys.readouterr().out)["deviation"]
    for key in ("weights", "features", "features_relative"):
        assert deviation["bfloat16"][key] > 100 * deviation["float32"][key]
    with safe_open("bfloat16.safetensors", framework="pt") as file:
        assert file.get_slice("norm.weight").get_dtype() == "BF16"
    assert peft_modal.load("bfloat16.head.safetensors").class_names


def test_what_cannot_merge_says_why_and_what_to_do(capsys):
    assert main(["fit", *IDPT, "--trainer.max_epochs=1", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: method 'idpt' cannot be merged: a set of prompts in 1 block has no equivalent")
    assert "Use the adapter file as it is" in sentence
    assert sentence.count("\n") == 1
    assert not Path("merged.safetensors").exists()


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("merged.pt", "'merged.pt' does not end in .safetensors"),
     ("run/adapter.safetensors", "would overwrite the adapter file itself")],
)  # fmt: skip
def test_a_merge_into_the_wrong_file_is_refused(run, out, sentence, capsys):
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", out]) == 2
    assert sentence in capsys.readouterr().err


def test_merged_weights_start_another_run():
    whole = ["--backbone.train_cls=false", "--trainer.max_epochs=1"]
    probe = ["--config", "pointcloud_linear_probe.yaml", *TINY_BACKBONE, *TINY_DATA, *whole]

    assert main(["fit", *IDPT[:-1], *whole, "--method=full", "--out", "run"]) == 0
    assert main(["merge", "--adapter", "run/adapter.safetensors", "--out", "merged.safetensors"]) == 0
    assert main(["fit", *probe, "--backbone.weights=merged.safetensors", "--out", "probe"]) == 0

    full, probed = (peft_modal.load(f"{name}/adapter.safetensors").backbone for name in ("run", "probe"))
    assert full.network.state_dict().keys() == probed.network.state_dict().keys()
    batch = full.example_batch()
    with torch.no_grad():
        assert torch.equal(full(batch).tokens, probed(batch).tokens)


def test_masked_pre_training_runs():
    assert main(["fit", *PRETRAIN, "--out", "run"]) == 0
    assert "test/loss" in metrics_of("run")
    # A task without classes has a report without them.
    twin = json.loads(Path("run/report.json").read_text())

    assert list(twin["sections"]) == ["curves", "parameters", "cost", "environment", "reproduce"]
    assert twin["facts"][0]["label"] == "Test loss"


def test_an_adapter_refuses_another_backbone(run, tmp_path):
    from peft_modal.files import load_adapter, save_adapter

    tensors, header = load_adapter(run / "adapter.safetensors")
    header.config["backbone"]["init_seed"] = 7
    save_adapter(tmp_path / "other.safetensors", tensors, header)

    with pytest.raises(BackboneMismatchError, match="fingerprint"):
        peft_modal.load(tmp_path / "other.safetensors")


def test_statistics_that_drift_are_in_the_file():
    assert main(["fit", *IDPT, "--backbone.frozen_mode=reference", "--out", "run"]) == 0
    model = peft_modal.load("run/adapter.safetensors")

    mean = model.adapter.state()["backbone.encoder.first_conv.1.running_mean"]
    assert not torch.equal(mean, model.backbone.tensor("encoder.first_conv.1.running_mean"))


def test_half_precision_trains():
    assert main(["fit", *IDPT, "--trainer.precision=bf16-mixed", "--out", "run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["test", "--adapter", "broken.safetensors"], "no readable safetensors file"),
        (["test", "--adapter", "none.safetensors"], "does not exist"),
        (["fit", *IDPT, "--method.k=17"], "17 neighbours are more than the 16 patches"),
        (
            ["fit", "--config", "pointcloud_idpt.yaml", "--data=folder", "--data.root=nowhere"],
            "neither a folder nor a CSV",
        ),
        (["fit", *IDPT, "--backbone.weights=nowhere.pth"], "nor an existing file"),
        (["fit", *IDPT, "--head.pool=[cls,foo]"], "no feature 'foo'"),
        (["fit", *IDPT, "--task.lr=1e30"], "the loss is not finite"),
        (["fit", *IDPT, "--data.batch_size=1"], "BatchNorm needs two samples"),
    ],
    ids=["corrupt", "missing", "neighbours", "folder", "weights", "pool", "nan", "batch"],
)
def test_a_mistake_ends_in_one_sentence_and_code_two(arguments, sentence, capsys):
    Path("broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_predicting_on_nothing_ends_in_a_sentence(run, capsys):
    Path("empty").mkdir()
    for path, sentence in {"empty": "found no files at all", "nowhere": "does not exist"}.items():
        assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", path, "--out", "out"]) == 2
        assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_shipped_configurations_are_found():
    names = [path.name for path in CONFIGS.rglob("*.yaml")]
    shipped = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "papers"]
    assert {"pointcloud_idpt.yaml", "pointcloud_linear_probe.yaml", "pointcloud_pretrain_nano.yaml"} <= set(names)
    assert len(shipped) == len(SHIPPED) == 22
    assert len(names) == len(set(names)), "`--config NAME` finds a file by its name alone"


# Pre-training generates its whole data set first, which may take minutes.
SHIPPED = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] if "pretrain" in path.stem else [])
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "papers"  # tests/{vision,pointcloud}/test_recipes.py
]


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_configuration_runs(path):
    if path.stem == "diffusion_pretrain_nano":
        from toy_pipeline import save_toy_pipeline

        save_toy_pipeline(Path("nano-start"))
    assert main(["fit", "--config", path.name, "--trainer.fast_dev_run=true", "--out", "run"]) == 0
    assert Path("run/adapter.safetensors").is_file()


def test_an_unfinished_run_does_not_go_on_with_other_settings(run, capsys):
    (run / "metrics.json").unlink()

    assert main(["fit", *IDPT, "--method.prompt_layer=0", "--out", "run"]) == 2
    assert "method.prompt_layer (was -1, now 0)" in capsys.readouterr().err
    assert main(["fit", *IDPT, "--out", "run"]) == 0


def test_block_masks_pre_train_from_the_first_pass_on():
    sizes = ["--data.per_family=2", "--data.num_points=128", "--data.pool_points=128", "--data.batch_size=16"]
    arguments = [*TINY_BACKBONE, *sizes, "--head.num_heads=3", "--head.group_size=8", "--trainer.max_epochs=1"]

    code = main(["fit", "--config", "pointcloud_pretrain_nano.yaml", *arguments, "--task.mask=block", "--out", "run"])

    assert code == 0
    assert "test/loss" in metrics_of("run")
