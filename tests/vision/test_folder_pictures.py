"""Folders of photos as people have them: every kind of file that is read, and what is said of those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import coordinates, write_images
from PIL import Image

from peft_modal.cli.main import main
from peft_modal.errors import DataError
from peft_modal_vision.data import Folder

RUN = [
    "fit", "--backbone=vit", "--backbone.weights=random", "--backbone.model=nano", "--method=bitfit", "--head=linear",
    "--task=classification", "--data=folder", "--data.root=photos", "--data.resolution=32", "--data.normalize=half",
    "--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=true", "--out=run",
]  # fmt: skip


def read(path: Path, **options: Any) -> torch.Tensor:
    """The one training picture (3, 32, 32) in 0..1 of a folder."""
    data = Folder(root=path, val_share=0, test_share=0, resolution=32, normalize="none", **options)
    data.setup("fit")
    (sample,) = data.load("train")  # type: ignore[misc]
    return sample["image"]


def gradient(mode: str) -> Image.Image:
    return coordinates(64, 40).convert(mode)


def photos(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 6) -> Path:
    """Folders of pictures, each of another size."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            coordinates(20 + 9 * i, 60 - 5 * i, blue=100 * label).save(root / name / f"{i} {name}.png")
    return root


@pytest.mark.parametrize(("mode", "ending"), [("CMYK", "jpg"), ("P", "png"), ("L", "png"), ("1", "png"), ("LA", "png")])
@pytest.mark.parametrize("resize", ["square", "crop"])
def test_any_colour_mode_becomes_the_square_of_three_channels(
    tmp_path: Path, mode: str, ending: str, resize: Any
) -> None:
    (tmp_path / "a").mkdir()
    gradient(mode).save(tmp_path / "a" / f"x.{ending}")
    pixels = read(tmp_path, resize=resize)
    assert pixels.shape == (3, 32, 32)
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_cmyk_and_palette_pictures_keep_their_colours(tmp_path: Path) -> None:
    for name, mode, ending in (("cmyk", "CMYK", "jpg"), ("palette", "P", "png")):
        (tmp_path / name / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20), (255, 0, 51)).convert(mode).save(tmp_path / name / "a" / f"x.{ending}", quality=95)
        colour = read(tmp_path / name)[:, 16, 16]
        assert torch.allclose(colour, torch.tensor([1.0, 0.0, 0.2]), atol=0.03), name


def test_16_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    values = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
    Image.fromarray(values).save(tmp_path / "a" / "x.png")
    pixels = read(tmp_path)
    assert torch.allclose(pixels[0, 0], torch.linspace(0, 1, 32), atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    (tmp_path / "a").mkdir()
    undone = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    scene = coordinates(32, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (scene if undone is None else scene.transpose(undone)).save(tmp_path / "a" / "x.png", exif=exif)
    upright = torch.from_numpy(np.array(scene)).permute(2, 0, 1) / 255
    assert torch.allclose(read(tmp_path), upright, atol=1e-6)


def test_pictures_of_unequal_sizes_share_a_batch(tmp_path: Path) -> None:
    data = Folder(root=photos(tmp_path / "photos"), resolution=32, batch_size=4)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["image"].shape == (4, 3, 32, 32)


def test_shots_are_drawn_from_what_is_left_to_train_on(tmp_path: Path) -> None:
    def split(shots: int | None, seed: int = 0) -> dict[str, list[str]]:
        data = Folder(root=tmp_path, resolution=32, seed=seed, shots=shots)
        data.setup(None)
        return {part: [i.path.as_posix() for i in data.load(part).items] for part in ("train", "val", "test")}  # type: ignore[arg-type]

    for name in ("a", "b"):
        write_images(tmp_path / name, 20)
    everything, four, two = split(None), split(4), split(2)
    assert set(two["train"]) < set(four["train"]) < set(everything["train"])
    assert (len(two["train"]), len(four["train"])) == (4, 8)
    assert two["val"] == everything["val"]
    assert two["test"] == everything["test"]
    assert split(4, seed=1)["train"] != four["train"]
    with pytest.raises(DataError, match=r"class 'a' has 14 samples to train on, data\.shots asks for 15"):
        split(15)


def test_a_class_folder_without_pictures_is_named(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    (tmp_path / "photos" / "horse").mkdir()
    with pytest.raises(DataError, match=r"class folder '.*horse' holds no .* files; found no files at all"):
        Folder(root=tmp_path / "photos").setup("fit")


def test_a_folder_of_photos_is_trained_on_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = photos(Path("photos"))
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient("RGB").save(root / "cat" / "turned.jpg", exif=exif)
    gradient("CMYK").save(root / "cat" / "cmyk.jpg")
    gradient("P").save(root / "dog" / "palette.gif")
    Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(root / "dog" / "deep.tiff")
    # Nothing held out and one batch of all: each kind is trained on.
    assert main([*RUN, "--data.val_share=0", "--data.test_share=0", "--data.batch_size=16"]) == 0
    assert Path("run/adapter.safetensors").is_file()


def test_a_folder_without_test_pictures_is_trained_on_but_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(Path("photos"))
    run = [argument for argument in RUN if "fast_dev_run" not in argument]
    assert main([*run, "--data.test_share=0", "--trainer.max_epochs=1"]) == 0
    assert not [name for name in json.loads(Path("run/metrics.json").read_text()) if name.startswith("test/")]
    assert main(["test", "--adapter", "run/adapter.safetensors"]) == 2
    assert "'photos' has no test files: add 'test/<class>/', or set a test_share." in capsys.readouterr().err


def test_an_epoch_of_shots_leaves_figures_of_all_test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(Path("photos"), count=10)
    run = [argument for argument in RUN if "fast_dev_run" not in argument]
    assert main([*run, "--data.shots=2", "--trainer.max_epochs=1"]) == 0
    assert "test/accuracy" in json.loads(Path("run/metrics.json").read_text())


def corrupt(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1)).save(path)


def words(path: Path) -> None:
    path.write_text("no picture", encoding="utf-8")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "says", "workers"),
    [
        (corrupt, "is damaged or cannot be read", 0), (corrupt, "is damaged or cannot be read", 1),
        (one_pixel, "has 1x1 pixels, expected 8 or more", 0), (words, "is no image that can be read here", 0),
        (nothing, "is empty", 0),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_ends_the_run_with_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    says: str,
    workers: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(photos(Path("photos")) / "dog" / "3 dog.png")
    whole = ["--data.val_share=0", "--data.test_share=0", "--data.batch_size=12", f"--data.num_workers={workers}"]
    assert main([*RUN, *whole]) == 2
    error = capsys.readouterr().err
    assert f"'{Path('photos/dog/3 dog.png')}' {says}" in error
    assert "Traceback" not in error


def test_an_empty_class_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(Path("photos"))
    Path("photos/horse").mkdir()
    assert main(RUN) == 2
    assert "class folder 'photos/horse' holds no" in capsys.readouterr().err
