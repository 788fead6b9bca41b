"""Segmentation: heads on every backbone, windows, figures, generated scenes and the readers of masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from peft_modal.__main__ import main
from peft_modal.errors import ConfigError, DataError
from peft_modal.methods.lora import LoRA
from peft_modal_heads.dense import DenseOutput
from peft_modal_heads.dense_linear import DenseLinear
from peft_modal_heads.setr import SETRPUP
from peft_modal_heads.upernet import UPerNet, pyramid
from peft_modal_vision.backbone import ConvNeXt, Swin, ViT
from peft_modal_vision.masks import Masks, Scenes, find_pairs, read_mask
from peft_modal_vision.patterns import SCENE_CLASSES
from peft_modal_vision.segmentation import IGNORED, Segmentation, windows

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


def vit(levels: Any) -> ViT:
    return ViT(model="custom", weights="random", sizes=SIZES, levels=levels)


def swin(levels: Any) -> Swin:
    sizes = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return Swin(model="custom", weights="random", sizes=sizes, levels=levels)


def convnext(levels: Any) -> ConvNeXt:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    return ConvNeXt(model="custom", weights="random", sizes=sizes, levels=levels)


@pytest.mark.parametrize("head", [DenseLinear, SETRPUP, UPerNet])
@pytest.mark.parametrize("make", [vit, swin, convnext])
def test_every_head_reads_every_backbone(make: Any, head: Any) -> None:
    backbone = make(4)
    options = {} if head is DenseLinear else {"width": 16, "auxiliary_width": 8}
    made = head(backbone.feature_spec(), 5, **options).train()
    batch = backbone.example_batch(2)
    output = made(backbone(batch))
    assert output.logits.shape[:2] == (2, 5)
    assert len(output.auxiliary) == {DenseLinear: 0, SETRPUP: 3, UPerNet: 1}[head]
    assert not made.eval()(backbone(batch)).auxiliary
    output.logits.sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if not name.startswith("auxiliary"))


def test_a_head_without_maps_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"set backbone\.levels=4"):
        UPerNet(vit(0).feature_spec(), 5)


@pytest.mark.parametrize(("levels", "expected"), [(1, (3,)), (2, (1, 3)), (4, (0, 1, 2, 3)), ([1, 2], (1, 2)), (0, ())])
def test_levels_are_spread_over_the_depth(levels: Any, expected: tuple[int, ...]) -> None:
    assert vit(levels).levels == expected


@pytest.mark.parametrize("levels", [5, [2, 1], [1, 1], [0, 4]])
def test_levels_that_are_not_there_are_refused(levels: Any) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.levels"):
        vit(levels)


def test_maps_of_one_resolution_become_a_pyramid() -> None:
    made = pyramid([torch.rand(1, 3, 8, 8) for _ in range(4)])
    assert [m.shape[-1] for m in made] == [32, 16, 8, 4]
    falling = [torch.rand(1, 3, s, s) for s in (16, 8, 4, 2)]
    assert [m.shape[-1] for m in pyramid(falling)] == [16, 8, 4, 2]


@pytest.mark.parametrize(("side", "window", "stride"), [(10, 4, 3), (10, 4, 4), (4, 4, 2), (3, 4, 2), (11, 5, 1)])
def test_windows_cover_every_pixel_and_stay_inside(side: int, window: int, stride: int) -> None:
    seen = np.zeros((side, side), dtype=int)
    for rows, columns in windows(side, side, window, stride):
        assert rows.stop - rows.start == min(window, side)
        seen[rows, columns] += 1
    assert seen.min() >= 1


def test_scenes_have_masks_of_their_classes_and_are_mirrored_together() -> None:
    data = Scenes(count=4, val_count=2, test_count=2, resolution=32)
    data.setup(None)
    samples = data.load("train")
    assert samples[0]["mask"].shape == (32, 32)
    assert int(samples.masks.max()) < len(SCENE_CLASSES)
    batch = {"image": torch.arange(8.0).view(1, 1, 1, 8).repeat(16, 1, 1, 1), "mask": torch.arange(8).repeat(16, 1, 1)}
    changed = data.augment(batch, torch.Generator().manual_seed(0))
    assert torch.equal(changed["image"][:, 0, 0].long(), changed["mask"][:, 0])
    assert len({int(row[0]) for row in changed["mask"][:, 0]}) == 2


def pairs(root: Path, *, split: str = "train", count: int = 3, size: tuple[int, int] = (40, 30)) -> None:
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "images" / split / f"{i}.png")
        mask = np.zeros(size, dtype=np.uint8)
        mask[:10] = 1
        mask[0] = IGNORED
        Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")


def test_own_pictures_and_masks_train_and_are_evaluated_in_windows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path / "mine")
    pairs(tmp_path / "mine", split="val", count=2, size=(50, 36))
    Path("run.yaml").write_text(
        f"backbone: {{name: vit, model: custom, weights: random, levels: 1, sizes: {SIZES}}}\n"
        "method: {name: lora, rank: 2}\nhead: {name: dense_linear}\ntask: {name: segmentation, window: 32}\n"
        "data: {name: masks, root: mine, classes: [ground, sky], resolution: 32, normalize: half, batch_size: 2}\n"
        "trainer: {max_epochs: 1}\n",
        encoding="utf-8",
    )
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 0
    assert "test/miou" in Path("run/metrics.json").read_text()
    assert main(["predict", "--adapter", "run/adapter.safetensors", "--input", "mine/images/val", "--out", "out"]) == 0
    rows = json.loads(Path("out/predictions.json").read_text())
    assert [row["mask"] for row in rows] == ["masks/0.png.png", "masks/1.png.png"]
    mask = Image.open(Path("out") / rows[0]["mask"])
    assert mask.size == (36, 50), "a mask has the size of its picture, not that of the network"
    share = float((np.asarray(mask) == 0).mean())
    assert rows[0]["shares"].get("ground", 0.0) == pytest.approx(share, abs=0.1)


def test_scenes_are_learnt_by_a_step(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        f"backbone: {{name: vit, model: custom, weights: random, levels: 4, sizes: {SIZES}}}\n"
        "method: {name: ssf}\nhead: {name: upernet, width: 8, auxiliary_width: 8}\ntask: {name: segmentation}\n"
        "data: {name: scenes, count: 4, val_count: 2, test_count: 2, resolution: 32, batch_size: 2}\n"
        "trainer: {max_epochs: 1}\n",
        encoding="utf-8",
    )
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 0


def small_task(**options: Any) -> Segmentation:
    backbone = vit(1)
    adapter = LoRA(rank=1).attach(backbone)
    return Segmentation(backbone, adapter, DenseLinear(backbone.feature_spec(), 3), ("sky", "sea", "boat"), **options)


def test_class_weights_are_factors_of_the_training_losses_of_pixels() -> None:
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 8, 8, dtype=torch.int64)
    mask[:, 4:], mask[0, 0, 0], mask[1, 7] = 1, 2, IGNORED
    weights = [0.5, 1.0, 20.0]
    each = torch.nn.functional.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="none")
    counted = mask != IGNORED
    factors = torch.tensor(weights)[mask.clamp(max=2)] * counted
    output = DenseOutput(logits, (logits,))

    weighted = small_task(class_weights=weights).losses({"mask": mask}, output)
    plain = small_task().losses({"mask": mask}, output)

    torch.testing.assert_close(weighted["loss"], (each * factors).sum() / counted.sum())
    torch.testing.assert_close(weighted["auxiliary"], 0.4 * weighted["loss"])
    torch.testing.assert_close(plain["loss"], each[counted].mean())
    evaluated = small_task(class_weights=weights).evaluation_losses({"mask": mask}, output)
    torch.testing.assert_close(evaluated["loss"], plain["loss"])
    assert not any("weights" in name for name in small_task(class_weights=weights).state_dict())


def test_class_weights_that_do_not_fit_the_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.class_weights: expected one number for each of the 3 classes"):
        small_task(class_weights=[1.0, 2.0])


def test_a_head_without_a_map_is_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        f"backbone: {{name: vit, model: custom, weights: random, sizes: {SIZES}}}\n"
        "method: {name: ssf}\nhead: {name: linear}\ntask: {name: segmentation}\n"
        "data: {name: scenes, count: 4, val_count: 2, test_count: 2, resolution: 32, batch_size: 2}\n"
        "trainer: {max_epochs: 1}\n",
        encoding="utf-8",
    )
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 2
    assert "segmentation needs a head that gives a map" in capsys.readouterr().err


def test_the_layouts_of_the_field_are_found(tmp_path: Path) -> None:
    ade, voc = tmp_path / "ade", tmp_path / "voc"
    for folder in ("images/training", "annotations/training"):
        (ade / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(ade / "images/training/a.jpg")
    Image.fromarray(np.array([[0, 1], [2, 150]], dtype=np.uint8).repeat(4, 0).repeat(4, 1)).save(
        ade / "annotations/training/a.png"
    )
    _, mask = Masks(root=ade, layout="ade20k").load("train").read(0)
    assert mask is not None
    assert mask[::4, ::4].tolist() == [[IGNORED, 0], [1, 149]]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(voc / "JPEGImages/x.jpg")
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0, 9, 9, 9] * 128)
    palette.save(voc / "SegmentationClass/x.png")
    (voc / "ImageSets/Segmentation/train.txt").write_text("x\n", encoding="utf-8")
    assert int(Masks(root=voc, layout="voc").load("train").read(0)[1].max()) == 3  # type: ignore[union-attr]
    (voc / "ImageSets/Segmentation/train.txt").write_text("x\nmissing\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"missing\.jpg' does not exist"):
        find_pairs(voc, "voc", "train")


def test_masks_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    pairs(tmp_path, count=1)
    data = Masks(root=tmp_path, classes=["ground"], resolution=32)
    with pytest.raises(DataError, match=r"0\.png' has the label 1, and there are 1 classes"):
        data.load("train").read(0)
    Image.new("L", (5, 5)).save(tmp_path / "masks/train/0.png")
    with pytest.raises(DataError, match=r"is 5 x 5 pixels, its picture 30 x 40"):
        data.load("train").read(0)
    Image.new("RGB", (30, 40)).save(tmp_path / "masks/train/0.png")
    with pytest.raises(DataError, match="holds colours, not labels"):
        read_mask(tmp_path / "masks/train/0.png")
    (tmp_path / "masks/train/0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be read as a mask"):
        read_mask(tmp_path / "masks/train/0.png")
    (tmp_path / "masks/train/0.png").unlink()
    with pytest.raises(DataError, match="each picture needs a mask"):
        data.load("train")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({}, r"data\.classes: name the classes"), ({"classes": ["a"], "scales": (2.0, 1.0)}, r"data\.scales")],
)
def test_wrong_settings_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Masks(root="x", **options)
