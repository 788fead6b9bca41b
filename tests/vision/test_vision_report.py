"""What vision adds to a report: masks beside pictures, and what a decision rests on."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

from peft_modal.report import Gallery, Table
from peft_modal.tasks.relevance import relevance
from peft_modal_vision.palette import coloured, palette
from peft_modal_vision.render import render
from peft_modal_vision.segmentation import IGNORED
from peft_modal_vision.segmentation_report import FOUND, SegmentationCollector

mpl.use("Agg")
NAMES = ("sky", "sea", "sand")


def collected() -> SegmentationCollector:
    masks = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [1, IGNORED]]])
    found = torch.tensor([[[0, 0], [1, 0]], [[0, 1], [0, 0]]])
    collector = SegmentationCollector(NAMES, lambda _batch, output: output, ignored=IGNORED, seed=0)
    collector.add({"image": torch.rand(2, 3, 2, 2), "mask": masks}, found)
    return collector


def test_the_worst_picture_comes_first() -> None:
    samples, _ = collected().sections()
    worst, drawn = samples.blocks
    assert isinstance(worst, Gallery)
    assert isinstance(drawn, Gallery)
    assert [tile.title for tile in worst.tiles] == ["33.3 % of pixels right", "75.0 % of pixels right"]
    assert {tile.facts[1].value for tile in drawn.tiles} == {0, 1}
    assert worst.tiles[0].facts[0].value == "sky, sea"


def test_figures_of_classes_leave_ignored_pixels_out() -> None:
    _, classes = collected().sections()
    pairs, figures = classes.blocks[0].blocks  # type: ignore[union-attr]
    assert isinstance(pairs, Table)
    assert pairs.rows == (("sea", "sky", 2 / 3), ("sky", "sea", 1 / 4))
    # sky: 3 right, 4 true, 5 taken for it; sea: 1 right, 3 true, 2 taken for it; sand is nowhere.
    assert figures.rows == (("sea", 3 / 7, 1 / 3, 1 / 4), ("sky", 4 / 7, 3 / 4, 1 / 2), ("sand", 0.0, None, None))
    assert classes.lead == "4 of 7 pixels are right."


def test_without_pictures_there_is_no_section() -> None:
    assert SegmentationCollector(NAMES, lambda _, output: output, ignored=IGNORED, seed=0).sections() == ()


def drawn(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Pixels of the picture, and how many lines lie over it."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    common = {"mean": torch.full((3,), 0.5), "deviation": torch.full((3,), 0.5)}
    render(axes, {**common, **sample}, None)
    return np.asarray(axes.images[0].get_array()), len(axes.collections)


def test_wrong_pixels_alone_are_coloured_in_the_last_quarter() -> None:
    mask, found = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64)
    found[1, 2], mask[0, 0], found[0, 0] = 2, IGNORED, 1
    sheet, _ = drawn({"image": torch.zeros(3, 4, 4), "mask": mask, FOUND: found})
    assert sheet.shape == (9, 9, 4)
    quarter = sheet[5:, 5:, :3]
    faded = 0.35 * 0.5 + 0.65
    is_faded = np.isclose(quarter, faded).all(-1)
    assert (~is_faded).sum() == 1
    assert np.allclose(quarter[1, 2], palette(3)[2] / 255)
    assert np.allclose(sheet[0, 5, :3], 0.5), "an ignored pixel shows the picture"
    assert (sheet[4] == 0).all(), "the gap is open"


def test_a_picture_is_brought_to_the_size_of_its_mask() -> None:
    mask = torch.zeros(6, 8, dtype=torch.int64)
    sheet, _ = drawn({"image": torch.zeros(3, 3, 4), "mask": mask, FOUND: mask})
    assert sheet.shape == (13, 17, 4)


@pytest.mark.parametrize(("peak", "lines"), [(True, 2), (False, 0)])
def test_relevance_is_enclosed_where_there_is_some(peak: bool, lines: int) -> None:
    found = torch.zeros(16, 16)
    if peak:
        found[4:7, 4:7] = 1.0
    pixels, count = drawn({"image": torch.zeros(3, 16, 16), "relevance": found})
    assert pixels.shape == (16, 16, 3)
    assert count == lines


def test_relevance_of_a_linear_score_is_what_each_place_adds() -> None:
    weight = torch.randn(3, 4, 5)

    def score(batch: dict[str, Tensor]) -> Tensor:
        return (batch["image"] * weight).flatten(1).sum(1) + 7.0

    with torch.inference_mode():
        batch = {"image": torch.randn(2, 3, 4, 5), "label": torch.zeros(2), "name": "kept"}
    found = relevance(score, batch, "image")
    assert torch.allclose(found, (batch["image"] * weight).sum(1), atol=1e-6)
    assert not found.requires_grad


def test_colours_of_neighbours_differ_and_stay_when_classes_are_added() -> None:
    assert (palette(5) == palette(200)[:5]).all()
    assert len(np.unique(palette(30), axis=0)) == 30
    assert coloured(np.array([[0, 255]])).shape == (1, 2, 3)
