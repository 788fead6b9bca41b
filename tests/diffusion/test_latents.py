"""Caches of latents and texts: the same numbers as without, made once, and whole again after every mishap."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path

import pytest
import torch
from image_folders import write_images
from torch import Tensor, nn

from peft_modal.data.cache_folder import cache_folder
from peft_modal.errors import ConfigError, DataError, TrainingError, WriteError
from peft_modal_diffusion.data import Folder, Pictures, Subject
from peft_modal_diffusion.latents import TextCache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


class Encoder:
    """A convolution as image encoder; counts what it has encoded."""

    def __init__(self, channels: int = 2) -> None:
        torch.manual_seed(3)
        self.network = nn.Conv2d(3, 2 * channels, 4, stride=4)
        self.encoded = 0

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += len(pixels)
        mean, log_std = self.network(pixels).chunk(2, dim=1)
        return mean, log_std.exp()


def folder(root: Path, **options) -> Folder:
    data = Folder(
        **{"root": root, "caption": "a picture", "resolution": 16, "batch_size": 2, "val_share": 0, **options}
    )
    data.setup("fit")
    return data


def cached(data: Pictures, encoder: Encoder | None = None, name: str = "weights", dtype: str = "float32") -> Encoder:
    encoder = encoder or Encoder()
    data.cache_latents(encoder, encoder=name, dtype=dtype)
    return encoder


def files() -> list[Path]:
    return sorted(cache_folder().rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "num_workers"), [({}, 0), ({"flip": True}, 0), ({"buckets": True, "bucket_step": 8, "flip": True}, 1)]
)
def test_cached_batches_are_what_the_encoder_makes_of_the_others(tmp_path, options, num_workers):
    write_images(tmp_path / "in" / "train", 3, size=(16, 20))
    write_images(tmp_path / "in" / "train", 2, size=(30, 16), first=3)
    write_images(tmp_path / "in" / "val", 1, first=5)
    plain = folder(tmp_path / "in", repeats=2, **options)
    data = folder(tmp_path / "in", repeats=2, num_workers=num_workers, **options)
    encoder = cached(data)
    for expected, found in (
        (plain.train_dataloader(), data.train_dataloader()),
        (plain.val_dataloader(), data.val_dataloader()),
    ):
        for one, other in zip(expected, found, strict=True):
            mean, std = encoder(one.pop("pixels"))
            torch.testing.assert_close(other.pop("latent_mean"), mean)
            torch.testing.assert_close(other.pop("latent_std"), std)
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]


@pytest.mark.parametrize(("flip", "variants"), [(False, 1), (True, 2)])
def test_each_picture_is_encoded_once_and_mirrored_only_for_training(tmp_path, flip, variants):
    write_images(tmp_path / "in" / "train", 3)
    write_images(tmp_path / "in" / "val", 2, first=3)
    write_images(tmp_path / "in" / "test", 1, first=5)
    options = {"flip": flip, "repeats": 4}
    assert cached(folder(tmp_path / "in", **options)).encoded == 3 * variants + 3
    assert cached(folder(tmp_path / "in", **options)).encoded == 0


def test_pictures_are_not_opened_again(tmp_path):
    write_images(tmp_path / "in", 3)
    data = folder(tmp_path / "in")
    cached(data)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    assert sum(len(batch["key"]) for batch in data.train_dataloader()) == 3


def test_another_network_precision_shape_or_content_is_encoded_again(tmp_path):
    write_images(tmp_path / "in", 3)
    cached(folder(tmp_path / "in"))
    assert cached(folder(tmp_path / "in"), name="other").encoded == 3
    assert cached(folder(tmp_path / "in"), dtype="bfloat16").encoded == 3
    assert cached(folder(tmp_path / "in", resolution=24)).encoded == 3
    (tmp_path / "in" / "01.png").rename(tmp_path / "in" / "renamed.png")
    write_images(tmp_path / "in", 1, first=9)
    assert cached(folder(tmp_path / "in")).encoded == 1


def test_a_damaged_file_is_made_again(tmp_path, caplog):
    write_images(tmp_path / "in", 3)
    cached(folder(tmp_path / "in"))
    path = files()[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert cached(folder(tmp_path / "in")).encoded == 1
    assert str(path) in caplog.text
    assert path.read_bytes() == whole


def test_a_full_disk_ends_in_a_sentence_and_the_next_run_makes_the_rest(tmp_path):
    write_images(tmp_path / "in", 3)
    write_images(tmp_path / "in", 1, size=(32, 160), first=3)
    options = {"resolution": 32, "buckets": True, "bucket_step": 8}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The square latents fit, those of the wide picture do not.
    encoder = Encoder(channels=8)
    data = folder(tmp_path / "in", **options)
    encoder.network = nn.Sequential(encoder.network, _Widen())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot be written: .*repeat the command") as caught:
            cached(data, encoder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert len(files()) == 3
    assert not [path for path in cache_folder().rglob("*") if path.suffix == ".tmp"]
    encoder.encoded = 0
    cached(folder(tmp_path / "in", **options), encoder)
    assert encoder.encoded == 1


class _Widen(nn.Module):
    """Makes the latents of pictures that are not square large."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[2] == x.shape[3] else x.repeat(1, 1, 10, 10)


def test_random_crops_are_refused(tmp_path):
    data = folder(write_images(tmp_path / "in", 1), crop="random")
    with pytest.raises(ConfigError, match=r"data.crop is 'random', and cached latents need fixed crops"):
        cached(data)


def test_latents_that_are_not_finite_name_the_picture(tmp_path):
    data = folder(write_images(tmp_path / "in", 1))
    with pytest.raises(TrainingError, match=r"latents of '.*00.png' are not finite; .* float32"):
        data.cache_latents(lambda x: (x, x / 0), encoder="weights", dtype="float16")
    assert files() == []


def test_latents_that_vanish_during_a_run_end_it_in_a_sentence(tmp_path):
    data = folder(write_images(tmp_path / "in", 1))
    cached(data)
    files()[0].unlink()
    with pytest.raises(DataError, match=r"the cached latents of '.*00.png' are gone or damaged .*repeat the command"):
        next(iter(data.train_dataloader()))


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_kept(tmp_path):
    write_images(tmp_path / "in", 3)
    content = (tmp_path / "in" / "02.png").read_bytes()
    (tmp_path / "in" / "02.png").write_bytes(content[:-40])
    with pytest.raises(DataError, match=r"02.png' is damaged"):
        cached(folder(tmp_path / "in", batch_size=1))
    (tmp_path / "in" / "02.png").write_bytes(content)
    assert cached(folder(tmp_path / "in", batch_size=1)).encoded == 1


def test_the_class_of_a_subject_is_cached_too(tmp_path):
    data = Subject(
        root=write_images(tmp_path / "sks", 2), instance_prompt="a sks", resolution=16, flip=True,
        class_root=write_images(tmp_path / "class", 3, first=10), class_prompt="a thing",
    )  # fmt: skip
    data.setup("fit")
    assert cached(data).encoded == 10
    batch = next(iter(data.train_dataloader()))
    assert batch["latent_mean"].shape == (2, 2, 4, 4)
    assert batch["prior"].tolist() == [False, True]
    assert "pixels" not in batch


def test_a_second_network_can_be_cached_by_the_same_data(tmp_path):
    data = folder(write_images(tmp_path / "in", 2))
    cached(data)
    assert cached(data, Encoder(channels=3), name="other").encoded == 2
    assert next(iter(data.train_dataloader()))["latent_mean"].shape == (2, 3, 4, 4)


class TextEncoder:
    """Embeds characters; counts what it has encoded."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.table = torch.randn(128, 6)
        self.encoded: list[str] = []

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        self.encoded += captions
        ids = torch.tensor([[ord(c) for c in text.ljust(12)[:12]] for text in captions])
        return {"states": self.table[ids], "pooled": self.table[ids].mean(1)}


def test_cached_texts_are_what_the_encoder_makes_of_them(tmp_path):
    encoder = TextEncoder()
    texts = TextCache(encoder, encoder="clip", dtype="float32")
    texts.fill(["a house", "a tree", "a house", ""], batch_size=2)
    assert encoder.encoded == ["a house", "a tree", ""]
    found = texts(["", "a tree", "a tree"])
    expected = TextEncoder()(["", "a tree", "a tree"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert encoder.encoded == ["a house", "a tree", ""]


def test_texts_are_encoded_once_for_all_runs_and_again_for_another_network(tmp_path):
    TextCache(TextEncoder(), encoder="clip", dtype="float32").fill(["a house"])
    encoder = TextEncoder()
    TextCache(encoder, encoder="clip", dtype="float32").fill(["a house", "a tree"])
    assert encoder.encoded == ["a tree"]
    TextCache(encoder, encoder="clip2", dtype="float32").fill(["a house"])
    assert encoder.encoded == ["a tree", "a house"]


def test_a_text_that_was_not_foreseen_or_is_damaged_is_encoded_when_it_is_asked_for(tmp_path):
    encoder = TextEncoder()
    texts = TextCache(encoder, encoder="clip", dtype="float32")
    texts(["a house"])
    files()[0].write_bytes(b"")
    torch.testing.assert_close(texts(["a house"])["states"], TextEncoder()(["a house"])["states"])
    texts(["a house"])
    assert encoder.encoded == ["a house"] * 2


def test_latents_of_a_list_of_captions_are_encoded_once(tmp_path):
    write_images(tmp_path / "in", 1)
    row = {"file_name": "00.png", "text": ["a", "b"]}
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(row))
    data = folder(tmp_path / "in", caption=None, repeats=20, batch_size=20)
    assert cached(data).encoded == 1
    assert set(next(iter(data.train_dataloader()))["caption"]) == {"a", "b"}
