"""Pictures of one's own with captions: read, trained on, and found."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from image_folders import write_images

from peft_modal.__main__ import main
from peft_modal.errors import DataError
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_clip.captioned import CaptionedPictures

RUN = [
    "fit", "--backbone=open_clip", "--method=lora", "--head=identity", "--task=contrastive", "--data=captions",
    "--data.resolution=32", "--data.normalize=half", "--data.batch_size=4", "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three parts; every odd picture has two captions."""
    for part, count in (("train", 8), ("val", 3), ("test", 5)):
        folder = write_images(tmp_path / "photos" / part, count, size=(20, 28))
        for i in range(count):
            second = f"another {i}\n" if i % 2 else ""
            (folder / f"{i:02d}.txt").write_text(f"a red circle {i}\n\n{second}", encoding="utf-8")
    return tmp_path / "photos"


def ready(root: Path, **options: object) -> CaptionedPictures:
    data = CaptionedPictures(root=root, resolution=16, **{"batch_size": 4, **options})  # type: ignore[arg-type]
    data.setup("fit")
    data.setup("test")
    return data


def test_each_line_beside_a_picture_is_a_caption(root: Path) -> None:
    data = ready(root)
    (batch,) = list(data.test_dataloader())
    assert batch["image"].shape == (5, 3, 16, 16)
    assert batch["caption"] == [f"a red circle {i}" for i in range(5)]
    assert batch["captions"] == [
        (f"a red circle {i}", f"another {i}") if i % 2 else (f"a red circle {i}",) for i in range(5)
    ]
    assert data.class_names == data.class_names_without_data({}) == ()


def test_training_takes_any_caption_by_the_seed(root: Path) -> None:
    data, again, other = ready(root), ready(root), ready(root, seed=1)
    sources = [d.train_source(d._sets["train"]) for d in (data, again, other)]
    assert len(sources[0]) == 2
    seen: Counter[str] = Counter()
    for epoch in range(12):
        for index in range(2):
            one, two, three = (source.batch(epoch, index) for source in sources)
            assert one["caption"] == two["caption"]
            assert torch.equal(one["image"], two["image"])
            assert one["caption"] != three["caption"]
            seen.update(one["caption"])
    assert len(seen) == 12
    assert 3 <= seen["another 1"] <= 9


def test_a_csv_names_a_picture_once_for_each_caption(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4, size=(20, 20))
    rows = [("path", "caption", "split"), ("images/00.png", "one", "train"), ("images/01.png", '"two", he said', "val")]
    rows += [("images/00.png", "uno", "train"), ("images/02.png", "three \U0001f600", "test")]
    with (tmp_path / "set.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    data = ready(tmp_path / "set.csv")
    assert [data.load(part).pictures[0].captions for part in ("train", "val", "test")] == [  # type: ignore[arg-type]
        ("one", "uno"), ('"two", he said',), ("three \U0001f600",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file,caption\n", "needs the columns path,caption"),
        ("path,caption\n", "names no images"),
        ("path,caption\ngone.png,x\n", r"line 2: the image '.*gone.png' does not exist"),
        ("path,caption\nimages/00.png,\n", "line 2: the caption is empty"),
        ("path,caption\nset.csv,x\n", "is no image by its ending"),
        ("path,caption,split\nimages/00.png,x,dev\n", "split is 'dev', expected train, val or test"),
        (
            "path,caption,split\nimages/00.png,x,train\nimages/00.png,y,val\n",
            "is in 'train' already, and here in 'val'",
        ),
    ],
)
def test_a_csv_that_cannot_serve_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    write_images(tmp_path / "images", 1, size=(20, 20))
    (tmp_path / "set.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        ready(tmp_path / "set.csv")
    with pytest.raises(DataError, match="does not exist"):
        ready(tmp_path / "absent.csv")


def test_a_run_finds_captions_and_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert main([*RUN, "--data.root=photos", "--out=run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    names = [f"{way}_r{rank}" for way in ("image_to_text", "text_to_image") for rank in (1, 5, 10)]
    assert {f"{part}/{name}" for part in ("val", "test") for name in names} <= set(figures)
    assert figures["test/text_to_image_r5"] == figures["test/image_to_text_r10"] == 1
    assert 0 <= figures["test/image_to_text_r1"] <= 1
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "Retrieval" in report
    assert "5 pictures and 7 texts" in report
    assert main(["test", "--adapter=run/adapter.safetensors", "--out=again"]) == 0
    again = json.loads(Path("again/metrics.json").read_text(encoding="utf-8"))
    assert {name: again[f"test/{name}"] for name in names} == {name: figures[f"test/{name}"] for name in names}


def test_recalls_are_those_of_the_networks_embeddings(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a run that trains nothing, counted by hand from the network's own vectors."""
    monkeypatch.chdir(root.parent)
    assert main([*RUN, "--data.root=photos", "--task.lr=0.0", "--out=run"]) == 0
    figures = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    backbone = OpenCLIPBackbone()
    backbone.load_weights()
    data = CaptionedPictures(root=root, resolution=32, normalize="half")
    data.setup("test")
    (batch,) = list(data.test_dataloader())
    texts = [text for captions in batch["captions"] for text in captions]
    owners = [i for i, captions in enumerate(batch["captions"]) for _ in captions]
    with torch.no_grad():
        images = torch.nn.functional.normalize(backbone({"image": batch["image"]}).tokens[:, 0], dim=-1)
        words = torch.nn.functional.normalize(backbone({"caption": texts}).tokens[:, 0], dim=-1)
    nearest_text = (images @ words.T).argmax(1).tolist()
    nearest_image = (images @ words.T).argmax(0).tolist()
    assert figures["test/image_to_text_r1"] == pytest.approx(
        sum(owners[t] == i for i, t in enumerate(nearest_text)) / 5
    )
    assert figures["test/text_to_image_r1"] == pytest.approx(
        sum(image == owner for image, owner in zip(nearest_image, owners, strict=True)) / 7
    )


def test_a_damaged_picture_ends_the_run_with_its_name(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root.parent)
    (root / "train" / "03.png").write_bytes(b"not a picture")
    assert main([*RUN, "--data.root=photos", "--out=run"]) == 2
    assert "03.png' is no image that can be read here" in capsys.readouterr().err


def test_a_picture_without_a_caption_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "02.txt").unlink()
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"02.png' has no caption.* beside it\.$"):
        ready(root)
    (root / "train" / "02.txt").write_text("\n")
    with pytest.raises(DataError, match=r"the caption is empty; write one\.$"):
        ready(root)
