"""`inspect` through the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_modal.cli.main import main
from peft_modal.files import FORMAT_VERSION, Header, save_adapter

TINY = [
    "--backbone=point_mae", "--backbone.weights=random", "--backbone.dim=24", "--backbone.depth=3",
    "--backbone.num_heads=3", "--backbone.num_group=16", "--backbone.group_size=8",
    "--backbone.pointnet_dims=[8,16,16]",
]  # fmt: skip
SHORT = ["--data.shots=4", "--data.val_per_class=2", "--data.test_per_class=2", "--data.num_points=128",
         "--data.pool_points=160", "--data.batch_size=16", "--trainer.max_epochs=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    return json.loads(shown(capsys, *arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ")


# A configuration


@pytest.mark.parametrize("method", ["lora", "idpt", "full"])
def test_what_is_inspected_is_what_is_trained(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "pointcloud_idpt.yaml", *TINY, *SHORT, f"--method={method}"]
    if method == "idpt":
        arguments.append("--method.k=8")
    report = parsed(capsys, *arguments)
    assert main(["fit", *arguments, "--out", "run"]) == 0

    figures = json.loads(Path("run/metrics.json").read_text())
    counts = report["parameters"]
    for name in ("adapter", "backbone_trained", "head", "training_only", "total", "trained_share"):
        assert counts[name] == pytest.approx(figures[f"params/{name}"])
    assert sum(place["parameters"] for place in report["places"]) == counts["trained"]
    size = Path("run/adapter.safetensors").stat().st_size
    assert report["file_bytes"] == pytest.approx(size, abs=2000)
    assert report["classes"]["source"] == "data"
    assert report["classes"]["count"] == 12
    ratio = report["estimate"]["ratio"]
    assert ratio["memory"] == 1 if method == "full" else ratio["memory"] < 1


def test_neither_weights_nor_data_need_to_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--config", "pointcloud_linear_probe.yaml", "--backbone.weights=somebody/a-model",
                 "--data=folder", "--data.root=/nowhere", "--method=lora")  # fmt: skip
    assert "lora on point_mae" in text
    assert not list(Path().iterdir())


def test_an_unknown_number_of_classes_is_said_and_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--config", "pointcloud_idpt.yaml", *TINY, "--method=lora", "--data=folder", "--data.root=/nowhere"]
    text = shown(capsys, *folder)
    head = next(line for line in text.splitlines() if "head: pointcloud_mlp" in line)
    fixed, per_class = re.search(r"([\d,]+) \+ ([\d,]+) a class", head).groups()  # type: ignore[union-attr]
    assert "unknown without data; totals assume 10 (--classes N sets the number)" in text
    assert "for 10 classes" in text

    known = parsed(capsys, *folder, "--classes", "40")
    assert known["parameters"]["head"] == int(fixed.replace(",", "")) + 40 * int(per_class.replace(",", ""))
    assert known["classes"]["source"] == "option"
    assert "unknown without data" not in shown(capsys, *folder, "--classes=40")


def test_a_head_without_classes_needs_no_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    report = parsed(capsys, "--config", "pointcloud_pretrain_nano.yaml")
    assert report["classes"] is None
    assert report["parameters"]["head_formula"]["per_class"] == 0
    assert "depends on values of its inputs" in report["estimate"]["method"]["unknown"]


def test_alike_blocks_stand_in_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *TINY, "--method=lora", "--method.sites=[attn.q]")
    (row,) = [line for line in text.splitlines() if "blocks 0-2" in line]
    assert "(3 x 384)" in row
    assert row.endswith("1,152")
    assert "attn.q  down 8x24, up 24x8" in text


def test_blocks_that_differ_stand_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *TINY, "--method=lora", "--method.sites={roles: [attn.q], blocks: [0, 2]}")
    assert "blocks 0, 2  (2 x 384)" in text


def test_the_batch_size_is_that_of_the_data_or_the_one_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "pointcloud_linear_probe.yaml", *TINY]
    own = parsed(capsys, *config)["estimate"]
    assert (own["batch_size"], own["batch_source"]) == (32, "data")
    asked = parsed(capsys, *config, "--batch-size=4")["estimate"]
    assert (asked["batch_size"], asked["batch_source"]) == (4, "option")
    assert asked["method"]["activations"] < own["method"]["activations"]
    assert "(assumed: --batch-size N sets it)" in shown(capsys, *TINY, "--method=lora")


def test_mixed_precision_saves_smaller_activations(capsys: pytest.CaptureFixture[str]) -> None:
    plain, mixed, other = (
        parsed(capsys, *TINY, "--method=full", f"--trainer.precision={p}")
        for p in ("32-true", "bf16-mixed", "bf16-true")
    )
    assert mixed["estimate"]["method"]["activations"] < plain["estimate"]["method"]["activations"]
    assert mixed["estimate"]["method"]["optimizer"] == plain["estimate"]["method"]["optimizer"]
    assert any("'bf16-true' is not estimated" in note for note in other["notes"])


def test_clipping_by_all_gradients_costs_full_fine_tunings_backward(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "pointcloud_idpt.yaml", *TINY, "--method=lora"]
    trainable, everything = (
        parsed(capsys, *config, f"--task.clip_scope={s}")["estimate"] for s in ("trainable", "all")
    )
    assert everything["method"]["flops"] > 1.2 * trainable["method"]["flops"]
    assert everything["method"]["optimizer"] == trainable["method"]["optimizer"]


def test_the_text_fits_one_hundred_columns_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    for arguments in (["--config", "pointcloud_pretrain_nano.yaml"], TINY, [*TINY, "--method=idpt", "--method.k=4"]):
        text = shown(capsys, *arguments)
        assert max(map(len, text.splitlines())) <= 100


def test_every_number_of_a_report_is_there_without_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    report = parsed(capsys, *TINY, "--method=lora")
    assert report["parameters"]["head"] == 0
    assert report["estimate"]["method"]["flops"] > 0
    assert any("Without a head" in note for note in report["notes"])


# An adapter file


def adapter_file(path: Path) -> Path:
    tensors = {f"adapter.blocks.{i}.attn.q.{part}": torch.zeros(shape) for i in range(4)
               for part, shape in (("down", (2, 8)), ("up", (8, 2)))}  # fmt: skip
    tensors |= {"backbone.cls_token": torch.zeros(1, 1, 8), "head.linear.weight": torch.zeros(3, 8).half()}
    header = Header(
        config={"backbone": {"name": "point_mae", "weights": "/gone.pt"}, "method": {"name": "lora", "rank": 2},
                "seed": 7},
        fingerprint="ab" * 32, class_names=("cup", "jar", "pot"), preprocessing={"num_points": 64},
        metrics={"test/accuracy": 0.75}, versions={"torch": "2.14.1"},
    )  # fmt: skip
    save_adapter(path, tensors, header)
    return path


def test_an_adapter_file_tells_all_without_its_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = adapter_file(tmp_path / "a.safetensors")
    text = shown(capsys, "--adapter", str(path))
    version = f"format version {FORMAT_VERSION}"
    for piece in (version, "lora  rank=2", "/gone.pt", "ab" * 32, "3: cup, jar, pot", "num_points=64",
                  "test/accuracy", "0.75", "torch=2.14.1", "blocks.0-3.attn.q.down  F32 2x8, 4 times",
                  "linear.weight  F16 3x8"):  # fmt: skip
        assert piece in text

    report = parsed(capsys, "--adapter", str(path))
    assert report["kind"] == "adapter"
    assert report["file_bytes"] == path.stat().st_size
    assert report["header"]["format_version"] == FORMAT_VERSION
    assert report["header"]["config"]["seed"] == 7
    assert len(report["tensors"]["adapter"]) == 8
    (head,) = report["tensors"]["head"]
    assert head == {"name": "head.linear.weight", "shape": [3, 8], "dtype": "F16", "bytes": 48}


def test_no_tensor_of_an_adapter_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import peft_modal.files

    def refuse(*_args: object) -> None:
        raise AssertionError("a tensor is read")

    path = adapter_file(tmp_path / "a.safetensors")

    class Watched:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str):
            return refuse if name == "get_tensor" else getattr(self.inner, name)

    real = peft_modal.files.safe_open
    monkeypatch.setattr(peft_modal.files, "safe_open", lambda *a, **k: Watched(real(*a, **k)))
    assert "cls_token" in shown(capsys, "--adapter", str(path))


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "not one that peft_modal wrote" in refused(capsys, "--adapter", "other.safetensors")
    assert "does not exist" in refused(capsys, "--adapter", "missing.safetensors")


# A backbone


def test_a_backbone_shows_its_anatomy_with_alike_blocks_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *TINY)
    lines = text.splitlines()
    assert "blocks 0-2" in lines
    assert sum("attn.q " in line for line in lines) == 1
    assert "blocks.blocks.0-2.attn.q" in text
    assert "prompts enter at position 1" in text
    assert "cls_token, cls_pos" in text

    report = parsed(capsys, *TINY)
    assert report["kind"] == "backbone"
    assert sum(site["role"] == "attn.q" for site in report["sites"]) == 3
    assert {port["role"] for port in report["ports"]} >= {"block.in", "mlp.branch", "embed.out"}
    assert report["layouts"]["blocks"]["repeats_positions"] is True
    assert report["depth"] == {"blocks": 3}


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to inspect: name a configuration with --config NAME, a file with --adapter FILE"),
        (["--adapter", "a.safetensors", "--method=lora"], "--method: an adapter file says all of itself"),
        (["--adapter", "a.safetensors", "--config", "x"], "--config: an adapter file says all of itself"),
        (["--config", "pointcloud_idpt.yaml", "--classes", "0"], "--classes: 0 is below 1"),
        (["--config", "pointcloud_idpt.yaml", "--classes", "many"], "peft-modal inspect: --classes: invalid int value"),
        (["--method=lora"], "backbone: missing"),
        (["--backbone=point_mea"], "backbone.name: unknown backbone 'point_mea'"),
        (["--backbone=point_mae", "--method=idpt", "--method.k=99"], "method 'idpt' cannot be attached"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *arguments).startswith(sentence)
