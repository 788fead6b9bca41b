"""The task of part segmentation: figures, the loss, the doubled step, whole runs, predictions, the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from peft_modal.__main__ import main
from peft_modal.api import build
from peft_modal.compose import compose
from peft_modal.errors import ConfigError
from peft_modal_heads.parts import PartOutput, PartTable
from peft_modal_pointcloud.part_metrics import GroupMean, shape_ious
from peft_modal_pointcloud.part_report import PartCollector
from peft_modal_pointcloud.render import FIRST_PART, LEGEND, SHOWN, STRONG, render

NAMES = ("cup/body", "cup/handle", "table/top", "table/leg", "table/shelf")
TABLE = PartTable(NAMES)
CONFIG = """
backbone:
  {name: point_mae, weights: random, init: torch, dim: 24, depth: 3, num_heads: 3, num_group: 8, group_size: 4,
   pointnet_dims: [8, 16, 16], has_cls: false, levels: 2}
method: {name: METHOD}
head: {name: pointcloud_parts, propagation_dims: [16, 16], hidden_dims: [16, 8], category_dim: 8}
task: {name: part_segmentation, lr: 0.01}
data:
  {name: part_solids, categories: [chair, stool], shots: 4, val_per_category: 2, test_per_category: 2, num_points: 32,
   pool_points: 40, batch_size: 4}
trainer: {max_epochs: 2, accelerator: cpu}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG.replace("METHOD", "idpt_parts"), encoding="utf-8")


def test_a_part_that_is_neither_there_nor_found_counts_one() -> None:
    parts = torch.tensor([[2, 2, 3, 3], [0, 0, 0, 1]])
    found = torch.tensor([[2, 3, 3, 3], [0, 0, 0, 0]])
    ious = shape_ious(found, parts, torch.tensor([1, 0]), TABLE)
    torch.testing.assert_close(ious, torch.tensor([(1 / 2 + 2 / 3 + 1) / 3, (3 / 4 + 0) / 2]))


def test_group_means_leave_out_what_never_occurred() -> None:
    mean = GroupMean(3)
    mean.update(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 0, 2]))
    mean.update(torch.tensor([0.7]), torch.tensor([2]))
    assert float(mean.compute()) == pytest.approx((0.5 + 0.6) / 2)
    assert mean.means().isnan().tolist() == [False, True, False]
    plain = GroupMean()
    plain.update(torch.tensor([True, False, True, True]))
    assert float(plain.compute()) == 0.75


def test_the_loss_lets_all_parts_compete_and_the_figures_only_those_of_the_category() -> None:
    task = build(compose("run.yaml"), NAMES).task()
    log_probs = torch.tensor([[[0.1, 0.1, 0.6, 0.1, 0.1], [0.2, 0.5, 0.1, 0.1, 0.1]]]).log()
    batch = {"parts": torch.tensor([[0, 1]])}
    output = PartOutput(log_probs, torch.tensor([0]))
    loss = task.losses(batch, output)["loss"]
    assert float(loss) == pytest.approx(-(np.log(0.1) + np.log(0.5)) / 2)
    assert task.table.found(output).tolist() == [[0, 1]]


def test_a_run_gives_figures_predictions_and_a_report() -> None:
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text())
    for name in ("instance_miou", "class_miou", "point_accuracy", "mean_part_accuracy"):
        assert 0 <= figures[f"test/{name}"] <= 1
    # As many test clouds of each category.
    assert figures["test/instance_miou"] == pytest.approx(figures["test/class_miou"])
    page = Path("run/report.html").read_text()
    assert "Smallest intersection over union" in page
    assert page.count("data:image/png") >= 4

    assert main(["test", "--adapter", "run/adapter.safetensors", "--out", "again"]) == 0
    again = json.loads(Path("again/metrics.json").read_text())
    assert {k: v for k, v in again.items() if k.startswith("test/")} == pytest.approx(
        {k: v for k, v in figures.items() if k.startswith("test/")}
    )

    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 3 + 1
    Path("clouds/stool").mkdir(parents=True)
    np.save("clouds/stool/mine.npy", points)
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", "clouds", "--out", "out"]) == 0
    (row,) = json.loads(Path("out/predictions.json").read_text())
    assert row["category"] == "stool"
    table = list(csv.DictReader(Path("out", row["parts"]).read_text().splitlines()))
    assert row["parts"] == "parts/stool/mine.npy.csv"
    assert np.allclose([[float(line[axis]) for axis in "xyz"] for line in table], points, rtol=1e-5, atol=1e-5)
    assert {line["part"].split("/")[0] for line in table} == {"stool"}
    shares = {name: sum(line["part"] == name for line in table) / 50 for name in row["shares"]}
    assert row["shares"] == pytest.approx(shares)

    other = ["predict", "--adapter", "run/adapter.safetensors", "--input", "clouds", "--out", "other"]
    assert main([*other, "--data.category=chair"]) == 0
    (row,) = json.loads(Path("other/predictions.json").read_text())
    assert row["category"] == "chair"


def test_an_equal_seed_gives_equal_figures() -> None:
    for out in ("one", "two"):
        assert main(["fit", "--config", "run.yaml", "--out", out, "--trainer.max_epochs=1"]) == 0
    one, two = (json.loads(Path(out, "metrics.json").read_text()) for out in ("one", "two"))
    assert {k: v for k, v in one.items() if k.startswith("test/")} == {
        k: v for k, v in two.items() if k.startswith("test/")
    }


def test_a_head_without_parts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(
        CONFIG.replace("METHOD", "lora").replace("pointcloud_parts, propagation_dims: [16, 16]", "linear")
        .replace(", hidden_dims: [16, 8], category_dim: 8", ""), encoding="utf-8",
    )  # fmt: skip
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 2
    assert "part segmentation needs a head that gives parts of points: pointcloud_parts" in capsys.readouterr().err


def doubled(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[list[float]]:
    """Gradient norms that AdamW saw, by batch."""
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert main(["fit", "--config", "run.yaml", "--out", "run", "--trainer.max_epochs=1", *arguments]) == 0
    return [seen[i : i + 2] for i in range(0, len(seen), 2)]


def test_the_doubled_step_takes_the_whole_gradient_and_then_the_clipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = doubled(monkeypatch, "--task.double_step=true", "--task.clip_norm=0.01")
    assert len(pairs) == 2
    for whole, clipped in pairs:
        assert whole > 0.02
        assert clipped == pytest.approx(0.01, rel=1e-3)


def test_one_step_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = doubled(monkeypatch, "--task.clip_norm=0.01")
    assert pairs == [[pytest.approx(0.01, rel=1e-3)] * 2]


def test_a_second_step_that_would_not_be_the_same_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task.double_step=true", "--method=sara", "--method.share=0.1"]
    assert main(["fit", "--config", "run.yaml", "--out", "run", *arguments]) == 2
    assert "the method acts at 'before_step' of one step, not of two" in capsys.readouterr().err
    task = build(compose("run.yaml", overrides=["task.double_step=true"]), NAMES).task()
    task._trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ConfigError, match=r"does not go with trainer\.precision=16-mixed"):
        task.on_fit_start()


def test_the_report_counts_what_it_saw() -> None:
    collector = PartCollector(TABLE, seed=0)
    parts = torch.tensor([[2, 2, 3, 3], [0, 0, 0, 1]])
    log_probs = torch.full((2, 4, 5), -9.0).scatter(2, torch.tensor([[2, 3, 3, 3], [0, 0, 0, 0]])[..., None], 0.0)
    assert collector.sections() == ()
    batch = {"points": torch.randn(2, 4, 3), "parts": parts, "category": torch.tensor([1, 0])}
    collector.add(batch, PartOutput(log_probs, batch["category"]))
    samples, figures = collector.sections()
    worst = samples.blocks[0].tiles
    assert [tile.title for tile in worst] == ["cup, true", "IoU 37.5 %", "table, true", "IoU 72.2 %"]
    assert worst[1].facts[0].value == 0.75
    assert figures.lead == "6 of 8 points are right."
    tables = {table.title: table for table in figures.blocks[0].blocks}
    assert tables["Figures of each category"].rows[0] == ("cup", 1, pytest.approx(0.375))
    rows = {row[0]: row[1:] for row in figures.blocks[1].rows}
    assert rows["table/leg"] == (0.25, 1.0, pytest.approx(2 / 3))
    assert rows["table/shelf"] == (0.0, None, None)


def test_parts_are_drawn_in_the_colours_of_their_names_and_right_ones_pale() -> None:
    points, parts = torch.randn(40, 3), torch.arange(40) % 2 + 2
    sample = {"points": points, SHOWN: parts, FIRST_PART: 2, LEGEND: ["top", "leg", "", "shelf", "drawer"]}
    true, found = drawn(sample), drawn({**sample, STRONG: torch.arange(40) < 5})
    (cloud,), (pale,) = true.collections, found.collections
    colours = {tuple(colour) for colour in cloud.get_facecolors()[:, :3].round(3)}
    names = {text.get_text(): to_rgb(text.get_color()) for text in true.texts}
    assert list(names) == ["top", "leg", "shelf", "drawer"]
    assert colours == {tuple(np.round(names[name], 3)) for name in ("top", "leg")}
    assert float(pale.get_facecolors()[:, 3].mean()) < 0.6 * float(cloud.get_facecolors()[:, 3].mean())
    (left, right), (low, high) = true.get_xlim(), true.get_ylim()
    assert right - left == pytest.approx(high - low)
    flat = np.asarray(cloud.get_offsets())
    legend = low + (high - low) * 0.17
    assert flat[:, 1].min() > legend
    assert left < flat[:, 0].min() < flat[:, 0].max() < right


def drawn(sample: dict[str, Any]) -> Any:
    axes = Figure(figsize=(2, 2)).add_axes((0, 0, 1, 1))
    render(axes, sample, None)
    return axes
