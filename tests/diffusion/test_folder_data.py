"""The data modules of images: batches, choices at random, buckets, subjects, and the mistakes of users."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from image_folders import coordinates, header_of_png, write_images
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from peft_modal.errors import ConfigError, DataError
from peft_modal_diffusion.data import Folder, Subject


def folder(root: Path, **options) -> Folder:
    data = Folder(**{"root": root, "caption": "a picture", "resolution": 16, **options})
    data.setup("fit")
    return data


def subject(root: Path, **options) -> Subject:
    options = {"root": root, "instance_prompt": "a photo of sks dog", "resolution": 16, **options}
    data = Subject(**options)
    data.setup("fit")
    return data


def batches(data, epoch: int = 0) -> list[dict]:
    source = data.train_source(data._sets["train"])
    return [source.batch(epoch, i) for i in range(len(source))]


def blues(batch) -> list[int]:
    """Which pictures of `write_images` a batch holds."""
    return ((batch["pixels"][:, 2, 0, 0] + 1) * 127.5).round().int().tolist()


def flat(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def everything(parts: list[dict]) -> list:
    """All that is in batches, for comparison."""
    return [(k, v.tolist() if isinstance(v, torch.Tensor) else v) for part in parts for k, v in part.items()]


def test_a_batch_holds_pixels_captions_sizes_and_keys(tmp_path):
    write_images(tmp_path, 3, size=(20, 30))
    data = folder(tmp_path, batch_size=3, val_share=0)
    (batch,) = batches(data)
    assert batch["pixels"].shape == (3, 3, 16, 16)
    assert batch["pixels"].min() >= -1
    assert batch["pixels"].max() <= 1
    assert batch["caption"] == ["a picture"] * 3
    for name, value in {"original_size": (20, 30), "crop": (0, 4), "target_size": (16, 16)}.items():
        assert batch[name].tolist() == [list(value)] * 3
        assert batch[name].dtype == torch.int64
    assert len(set(batch["key"])) == 3
    assert data.class_names == ()
    assert json.loads(json.dumps(data.preprocessing)) == {"resolution": 16, "buckets": []}


def test_an_epoch_shows_every_picture_once_in_a_new_order(tmp_path):
    data = folder(write_images(tmp_path, 7), batch_size=3, val_share=0)
    shown = [[blues(batch) for batch in batches(data, epoch)] for epoch in (0, 1)]
    for epoch in shown:
        assert [len(part) for part in epoch] == [3, 3, 1]
        assert sorted(flat(epoch)) == list(range(7))
    assert shown[0] != shown[1]


def test_repeats_show_each_picture_so_often(tmp_path):
    data = folder(write_images(tmp_path, 2), batch_size=3, repeats=3)
    assert sorted(flat(map(blues, batches(data)))) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_follow_from_seed_epoch_and_place(tmp_path, num_workers):
    write_images(tmp_path, 5, size=(16, 40))
    rows = [{"file_name": f"{i:02d}.png", "text": ["a", "b", "c"]} for i in range(5)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"caption": None, "crop": "random", "flip": True, "batch_size": 2}
    data = folder(tmp_path, **options, num_workers=num_workers)
    first = everything(batches(data))
    assert everything(batches(folder(tmp_path, **options))) == first
    assert everything(data.train_dataloader()) == first
    assert everything(batches(data, epoch=1)) != first
    assert everything(batches(folder(tmp_path, **options, seed=1))) != first


class Recorder(pl.LightningModule):
    """Remembers what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[dict] = []

    def training_step(self, batch, _index):
        self.seen.append(batch)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: Folder, root: Path, *, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[saver],
    )  # fmt: skip
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_sees_what_it_would_have_seen(tmp_path):
    options = {"crop": "random", "flip": True, "batch_size": 2}
    root = write_images(tmp_path / "in", 5, size=(16, 40))
    whole = fit(folder(root, **options), tmp_path / "a").seen
    rest = fit(folder(root, **options), tmp_path / "b", resume=tmp_path / "a" / "step=2.ckpt").seen
    assert len(whole) == 6
    assert everything(rest) == everything(whole[2:])


def test_what_is_random_in_training_is_fixed_in_validation(tmp_path):
    write_images(tmp_path / "train", 40, size=(16, 40))
    write_images(tmp_path / "val", 3, size=(16, 40))
    for part, count in (("train", 40), ("val", 3)):
        rows = [{"file_name": f"{part}/{i:02d}.png", "text": ["first", "second"]} for i in range(count)]
        with (tmp_path / "metadata.jsonl").open("a") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
    data = folder(tmp_path, caption=None, crop="random", flip=True, batch_size=40)
    (batch,) = batches(data)
    assert set(batch["caption"]) == {"first", "second"}
    assert len(set(batch["crop"][:, 1].tolist())) > 10
    is_flipped = batch["pixels"][:, 1, 0, 0] > batch["pixels"][:, 1, 0, -1]
    assert 5 < int(is_flipped.sum()) < 35
    assert [key.endswith("-flipped") for key in batch["key"]] == is_flipped.tolist()
    (batch,) = data.val_dataloader()
    assert batch["caption"] == ["first"] * 3
    assert batch["crop"].tolist() == [[0, 12]] * 3
    assert not any(key.endswith("-flipped") for key in batch["key"])


def test_by_default_nothing_is_flipped_and_crops_are_centred(tmp_path):
    (batch,) = batches(folder(write_images(tmp_path, 12, size=(16, 40)), batch_size=12))
    assert batch["crop"].tolist() == [[0, 12]] * 12
    assert (batch["pixels"][:, 1, 0, 0] < batch["pixels"][:, 1, 0, -1]).all()


def test_the_crop_of_a_flipped_picture_is_told_in_mirrored_coordinates(tmp_path):
    coordinates(16, 40).save(tmp_path / "a.png")
    data = folder(tmp_path, crop="random", flip=True, repeats=30, batch_size=30)
    (batch,) = batches(data)
    columns = ((batch["pixels"][:, 1, 0] + 1) * 127.5).round().int()  # (30, 16)
    assert {key.endswith("-flipped") for key in batch["key"]} == {True, False}
    for key, row, (_, left) in zip(batch["key"], columns, batch["crop"].tolist(), strict=True):
        # In the mirrored picture column c stands at 39 - c.
        assert int(row[0]) == (39 - left if key.endswith("-flipped") else left)


def test_a_share_is_held_out_and_no_picture_is_in_both(tmp_path):
    data = folder(write_images(tmp_path, 20), batch_size=20, val_share=0.25)
    (train,), (val,) = batches(data), data.val_dataloader()
    assert sorted(blues(train) + blues(val)) == list(range(20))
    assert len(blues(val)) == 5


def test_one_image_is_enough_and_there_is_no_validation(tmp_path):
    data = folder(write_images(tmp_path, 1), batch_size=4)
    (batch,) = batches(data)
    assert batch["pixels"].shape == (1, 3, 16, 16)
    assert data.val_dataloader() == []
    data.setup("test")
    assert data.test_dataloader() == []


def test_a_batch_holds_pictures_of_one_bucket_and_an_epoch_all_of_them(tmp_path):
    write_images(tmp_path, 5, size=(32, 32))
    write_images(tmp_path, 4, size=(20, 48), first=5)
    write_images(tmp_path, 1, size=(48, 20), first=9)
    data = folder(tmp_path, resolution=32, buckets=True, bucket_step=8, batch_size=2, val_share=0)
    epochs = [batches(data, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(flat(map(blues, epoch))) == list(range(10))
        assert sorted(len(blues(batch)) for batch in epoch) == [1, 1, 2, 2, 2, 2]
        for batch in epoch:
            height, width = batch["target_size"][0].tolist()
            assert batch["pixels"].shape[2:] == (height, width)
            assert (batch["target_size"] == torch.tensor([height, width])).all()
    shapes = {tuple(batch["pixels"].shape[2:]) for batch in epochs[0]}
    assert shapes == {(32, 32), (24, 48), (48, 24)}
    # The shapes do not come one after the other.
    assert len({tuple(tuple(batch["pixels"].shape) for batch in epoch) for epoch in epochs}) > 1
    assert data.preprocessing["buckets"][0] == [16, 56]


def test_validation_keeps_to_the_buckets(tmp_path):
    write_images(tmp_path / "train", 1, size=(32, 32))
    write_images(tmp_path / "val", 3, size=(32, 32))
    write_images(tmp_path / "val", 2, size=(20, 48), first=3)
    data = folder(tmp_path, resolution=32, buckets=True, bucket_step=8, batch_size=1)
    assert [blues(batch) for batch in data.val_dataloader()] == [[0, 1], [2], [3, 4]]


def test_captions_lists_each_text_once(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1)
    write_images(tmp_path / "test", 1)
    texts = {"train/00.png": ["b", "a"], "train/01.png": "a", "val/00.png": "c", "test/00.png": "d"}
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert folder(tmp_path, caption=None).captions() == ("b", "a", "c", "d")


def test_the_key_follows_from_content_shape_and_flip_not_from_the_name(tmp_path):
    write_images(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "00.png").rename(tmp_path / "b" / "other.png")
    keys = {name: sorted(batches(folder(tmp_path / name))[0]["key"]) for name in ("a", "b")}
    assert keys["a"] == keys["b"]
    assert sorted(batches(folder(tmp_path / "a", resolution=24))[0]["key"]) != keys["a"]
    write_images(tmp_path / "b", 1, first=7)
    assert set(keys["a"]) < set(batches(folder(tmp_path / "b"))[0]["key"])


def test_pictures_that_have_to_be_enlarged_are_told_once(tmp_path, caplog):
    write_images(tmp_path, 2, size=(12, 20))
    write_images(tmp_path, 1, size=(40, 40), first=2)
    coordinates(9, 10).save(tmp_path / "small.png")
    with caplog.at_level(logging.WARNING):
        folder(tmp_path)
    (record,) = caplog.records
    assert "3 of 4 images are smaller" in record.getMessage()
    assert f"the smallest, '{tmp_path / 'small.png'}', has 10x9 pixels for 16x16" in record.getMessage()


def test_every_kind_of_image_is_in_the_batch(tmp_path):
    image = Image.new("RGB", (40, 30), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "upright.png")
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("CMYK").save(tmp_path / "print.jpg")
    image.convert("P").save(tmp_path / "palette.gif")
    Image.new("I;16", (40, 30), 30000).save(tmp_path / "deep.png")
    image.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (40, 30))], lossless=True)
    (batch,) = batches(folder(tmp_path, batch_size=6))
    sizes = {(30, 40): 5, (40, 30): 1}
    counted = [tuple(size) for size in batch["original_size"].tolist()]
    assert {size: counted.count(size) for size in set(counted)} == sizes
    assert int((batch["pixels"][:, 0, 8, 8] > 0.9).sum()) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header_of_png(20_000, 10_000), "bad.png' has 200 megapixels, the most that is read is 100"),
        (header_of_png(1, 1), "bad.png' has 1x1 pixels, expected 8 or more"),
        (b"text", "bad.png' is no image that can be read here"),
        (b"", "bad.png' is empty"),
        (header_of_png(12_000_000, 8), "bad.png' has 12000000x8 pixels, which become 24000000x16 to cover 16x16"),
    ],
    ids=["bomb", "dot", "text", "empty", "strip"],
)
@pytest.mark.parametrize("make", [folder, subject])
def test_a_bad_file_is_named_before_anything_is_trained(tmp_path, content, message, make):
    write_images(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        make(tmp_path)


def test_a_damaged_file_is_named_when_it_is_read(tmp_path):
    write_images(tmp_path, 2)
    content = (tmp_path / "00.png").read_bytes()
    (tmp_path / "00.png").write_bytes(content[:-40])
    data = folder(tmp_path)
    with pytest.raises(DataError, match=r"00.png' is damaged or cannot be read: "):
        batches(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"resolution": 0}, "resolution is 0, expected 1 or more"),
        ({"repeats": 0}, "repeats is 0, expected 1 or more"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"crop": "center"}, "crop is 'center', expected 'centre' or 'random'"),
        ({"val_share": 1.0}, "val_share is 1.0"),
        ({"buckets": True, "resolution": 500}, "resolution is 500, expected a multiple of bucket_step, which is 64"),
        ({"buckets": True, "bucket_step": 4}, "bucket_step, which is 4 and must be 8 or more"),
    ],
)
def test_an_argument_that_cannot_serve_is_told(tmp_path, options, message):
    write_images(tmp_path, 1)
    with pytest.raises(ConfigError, match=message):
        folder(tmp_path, **options)


def test_a_missing_caption_is_told_when_the_data_is_set_up(tmp_path):
    write_images(tmp_path, 1)
    with pytest.raises(DataError, match=r"00.png' has no caption"):
        folder(tmp_path, caption=None)


def test_a_caption_of_ten_thousand_characters_arrives_whole(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "00.txt").write_text("x" * 10_000)
    assert batches(folder(tmp_path, caption=None))[0]["caption"] == ["x" * 10_000]


@pytest.fixture
def dogs(tmp_path):
    """Two pictures of a subject, three wide ones of its class."""
    write_images(tmp_path / "sks", 2)
    write_images(tmp_path / "class", 3, size=(16, 24), first=10)
    return {"root": tmp_path / "sks", "class_root": tmp_path / "class", "class_prompt": "a photo of dog"}


def test_a_subject_is_followed_by_as_many_of_its_class(dogs):
    data = subject(**dogs, batch_size=2)
    shown = batches(data)
    assert [len(batch["caption"]) for batch in shown] == [4, 2]
    for batch in shown:
        half = len(batch["caption"]) // 2
        assert batch["caption"] == ["a photo of sks dog"] * half + ["a photo of dog"] * half
        assert batch["prior"].tolist() == [False] * half + [True] * half
        assert [blue >= 10 for blue in blues(batch)] == batch["prior"].tolist()
        # Each picture has its own sizes.
        assert batch["original_size"].tolist() == [[16, 16]] * half + [[16, 24]] * half
        assert batch["crop"].tolist() == [[0, 0]] * half + [[0, 4]] * half
    assert sorted(flat(blues(batch)[len(blues(batch)) // 2 :] for batch in shown)) == [10, 11, 12]
    assert data.val_dataloader() == []
    assert set(data.captions()) == {"a photo of sks dog", "a photo of dog"}


def test_the_larger_set_makes_the_epoch_and_the_other_comes_again(dogs):
    data = subject(**dogs, repeats=4, batch_size=8)
    (batch,) = batches(data)
    assert sorted(blues(batch)) == [0] * 4 + [1] * 4 + [10] * 3 + [11] * 3 + [12] * 2


def test_without_a_class_there_is_the_subject_alone(dogs):
    (batch,) = batches(subject(dogs["root"], batch_size=4))
    assert sorted(blues(batch)) == [0, 1]
    assert batch["prior"].tolist() == [False, False]


def test_pictures_of_the_class_may_be_made_after_the_setup(dogs, tmp_path):
    data = subject(**dogs | {"class_root": tmp_path / "made"})
    assert data.class_images() == ()
    with pytest.raises(DataError, match=r"made' holds no pictures of the class: put some of 'a photo of dog' there"):
        data.train_dataloader()
    write_images(tmp_path / "made", 1, first=10)
    assert len(data.class_images()) == 1
    assert sorted(blues(batches(data)[0])) in ([0, 10], [1, 10])


def test_the_order_of_a_subject_follows_from_seed_and_epoch(dogs):
    options = {**dogs, "crop": "random", "flip": True}
    first = everything(batches(subject(**options)))
    assert everything(batches(subject(**options))) == first
    assert everything(batches(subject(**options), epoch=1)) != first
    assert everything(batches(subject(**options, seed=1))) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_prompt": " "}, "data.instance_prompt is empty"),
        ({"class_prompt": None}, "data.class_root and data.class_prompt belong together"),
        ({"class_root": None}, "data.class_root and data.class_prompt belong together"),
        ({"class_root": "sks/dogs"}, "neither may lie in the other"),
        ({"class_root": "."}, "neither may lie in the other"),
    ],
)
def test_a_subject_that_cannot_serve_is_told(dogs, monkeypatch, options, message):
    monkeypatch.chdir(dogs["root"].parent)
    with pytest.raises(ConfigError, match=message):
        subject(**dogs | options)


def test_a_subject_without_pictures_is_told(tmp_path):
    tmp_path.joinpath("notes.md").touch()
    with pytest.raises(DataError, match=r"holds no .*\.png.* files; found \.md \(1\)"):
        subject(tmp_path)
