"""What CLIP sees of a picture, against Pillow by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coop_trees import TREES
from image_folders import coordinates
from PIL import Image

from peft_modal.errors import ConfigError
from peft_modal_clip.fewshot import FewShotSet
from peft_modal_vision.transforms import TrainingView

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
DEVIATION = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (300, 226), (16, 16)])
def test_the_middle_of_a_picture_is_resized_by_pillows_bicubic_filter(tmp_path: Path, size: tuple[int, int]) -> None:
    TREES["eurosat"](tmp_path)
    side = 32
    data = FewShotSet(root=tmp_path, dataset="eurosat", shots=1, resolution=side)
    data.setup("test")
    path = data.load("test").items[0].path
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)
    found = data.load("test")[0]["image"]
    height, width = size
    short = min(size)
    resized = Image.fromarray(noise).resize(
        (width * side // short, height * side // short), Image.Resampling.BICUBIC
    )  # fmt: skip
    left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
    cut = np.asarray(resized.crop((left, top, left + side, top + side)))
    expected = (torch.tensor(cut).permute(2, 0, 1).float() / 255 - MEAN) / DEVIATION
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.08, 0.12)])
def test_training_takes_a_share_of_the_area(scale: tuple[float, float]) -> None:
    """Red is the row and green the column of each pixel, so a crop's range tells what was taken."""
    view = TrainingView(32, "fit", ["resized_crop"], scale)
    image = coordinates(200, 200)
    shares = []
    for seed in range(60):
        pixels = view(image, torch.Generator().manual_seed(seed)) * 255
        height, width = (float(pixels[axis].max() - pixels[axis].min()) for axis in (0, 1))
        shares.append(height * width / 200**2)
    # Bicubic filters give up a little at the edges.
    assert 0.75 * scale[0] < min(shares)
    assert max(shares) < 1.1 * scale[1]
    assert max(shares) - min(shares) > 0.5 * (scale[1] - scale[0])


def test_training_pictures_follow_from_the_seed_and_are_mirrored_half_the_time(tmp_path: Path) -> None:
    TREES["eurosat"](tmp_path)
    options = {"root": tmp_path, "dataset": "eurosat", "shots": 4, "resolution": 16, "batch_size": 4}
    batches = []
    for seed in (1, 1, 2):
        data = FewShotSet(**options, seed=seed)  # type: ignore[arg-type]
        data.setup("fit")
        batches.append(data.train_source(data._sets["train"]).batch(0, 0)["image"])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    view = TrainingView(16, "fit", ["flip"])
    image = coordinates(16, 16)
    first = [float(view(image, torch.Generator().manual_seed(seed))[1, 0, 0]) for seed in range(100)]
    assert 30 < sum(column > 0 for column in first) < 70


@pytest.mark.parametrize("scale", [(0.9, 0.5), (0.0, 1.0), (0.5, 1.5)])
def test_shares_that_are_no_range_are_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"data.crop_scale: expected two shares above 0"):
        TrainingView(32, "fit", ["resized_crop"], scale)
