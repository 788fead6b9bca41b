"""Boxes, crops, labels, losses and the choice of a cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_modal.anatomy import FeatureSpec
from peft_modal.errors import ConfigError, DataError
from peft_modal_heads.tracking_mlp import TrackingMLP, TrackingOutput, boxes_around, cell_centres
from peft_modal_tracking.boxes import cells_of, clipped, is_box, rasterised, size_of, to_corners, to_sizes
from peft_modal_tracking.crops import at_least, channel_means, crop, crop_map
from peft_modal_tracking.losses import generalised_iou, iou, positive_cells, tracking_losses
from peft_modal_tracking.selection import hann_window, select_box
from peft_modal_tracking.steps import CropSettings, TrackState

SETTINGS = CropSettings((16, 16), (32, 32))


def image(height: int = 40, width: int = 60) -> Tensor:
    return torch.rand(3, height, width) * 255


def test_boxes_have_two_forms() -> None:
    boxes = torch.tensor([[3.0, 4.0, 10.0, 20.0]])
    assert to_corners(boxes).tolist() == [[3, 4, 13, 24]]
    assert torch.equal(to_sizes(to_corners(boxes)), boxes)


def test_a_raster_holds_every_cell_that_is_touched() -> None:
    boxes = torch.tensor([[0.9, 1.0, 2.0, 2.1], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.00005, 3.0]])
    assert rasterised(boxes).tolist() == [[0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 2, 3]]


def test_cells_keep_rows_and_columns_apart() -> None:
    cells = cells_of(torch.tensor([[10.0, 0.0, 29.0, 5.0]]), (20, 40), (2, 4))
    assert cells.tolist() == [[[0, 1, 1, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize("box", [[3.2, 3.3, 3.4, 3.5], [-9, -9, 0.5, 0.5], [31.9, 31.9, 50, 50]])
def test_every_visible_target_has_a_positive_cell(box: list[float]) -> None:
    assert int(positive_cells(torch.tensor([box]), (32, 32), (4, 4)).sum()) >= 1


def test_a_crop_is_as_large_as_the_area_factor_says() -> None:
    box = torch.tensor([20.0, 10.0, 30.0, 30.0])  # 10 x 20, mean side 15
    found = crop_map(box, (32, 32), 4.0)
    assert float(found.scale[0]) == pytest.approx((32 * 32 / ((10 + 45) * (20 + 45))) ** 0.5)
    inside = found.to_crop(box)
    assert ((inside[:2] + inside[2:]) / 2).tolist() == pytest.approx([16.0, 16.0], abs=1e-5)
    torch.testing.assert_close(found.to_image(inside), box)


def test_a_crop_of_another_shape_keeps_its_centre() -> None:
    box = torch.tensor([20.0, 10.0, 30.0, 20.0])
    inside = crop_map(box, (16, 32), 4.0).to_crop(box)
    assert ((inside[:2] + inside[2:]) / 2).tolist() == pytest.approx([16.0, 8.0], abs=1e-5)


def test_the_real_map_follows_what_was_cut_out() -> None:
    picture = torch.zeros(3, 40, 60)
    picture[:, 12:20, 24:36] = 255  # x 24..36, y 12..20
    box = torch.tensor([24.0, 12.0, 36.0, 20.0])
    wanted = crop_map(box, (64, 64), 4.0)
    cut, real = crop(picture, wanted, (64, 64), torch.zeros(3))
    rows, columns = (cut[0] > 127).nonzero(as_tuple=True)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    assert float((real.to_crop(box) - found).abs().max()) < 1.0
    assert not torch.equal(real.scale, wanted.scale)


def test_what_lies_outside_has_the_fill_and_nothing_else() -> None:
    box = torch.tensor([0.0, 0.0, 8.0, 8.0])
    fill = torch.tensor([1.0, 2.0, 3.0])
    cut, _ = crop(torch.full((3, 40, 60), 200.0), crop_map(box, (32, 32), 4.0), (32, 32), fill)
    assert cut[:, 0, 0].tolist() == [1, 2, 3]
    assert cut[:, -1, -1].tolist() == [200, 200, 200]


def test_a_crop_outside_of_the_image_is_all_fill() -> None:
    cut, _ = crop(image(), crop_map(torch.tensor([500.0, 500, 510, 510]), (8, 8), 4.0), (8, 8), torch.zeros(3))
    assert not bool(cut.any())


def test_the_first_frames_mean_surrounds_later_frames() -> None:
    first, later = torch.full((3, 40, 60), 100.0), torch.full((3, 40, 60), 200.0)
    state = TrackState(first, torch.tensor([0.0, 0.0, 10.0, 10.0]), SETTINGS)
    search = state.look(later)
    assert torch.equal(state.fill, channel_means(first))
    assert float(search[0, 0, 0]) == pytest.approx((100 / 255 - 0.5) / 0.5, abs=1e-5)
    assert float(search[0, -1, -1]) == pytest.approx((200 / 255 - 0.5) / 0.5, abs=1e-5)


def test_a_box_without_area_does_not_move_the_tracker() -> None:
    state = TrackState(image(), torch.tensor([20.0, 10.0, 30.0, 20.0]), SETTINGS)
    before = state.box.clone()
    state.look(image())
    far = state.map.to_crop(torch.tensor([-30.0, -30.0, -20.0, -20.0]))
    assert not bool(is_box(state.update(far, (40, 60))))
    assert torch.equal(state.box, before)


def test_a_tiny_box_is_looked_for_as_if_it_were_ten_pixels_wide() -> None:
    state = TrackState(image(), torch.tensor([20.0, 10.0, 22.0, 12.0]), SETTINGS)
    state.look(image())
    assert torch.equal(state.wanted.scale, crop_map(torch.tensor([16.0, 6.0, 26.0, 16.0]), (32, 32), 4.0).scale)
    assert at_least(torch.tensor([20.0, 10.0, 22.0, 30.0]), 10.0).tolist() == [16, 10, 26, 30]


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([10, 10, 10, 20], r"the first box 10,10,0,10 has no area"),
        ([70, 50, 80, 60], r"lies outside of the frame of 60 x 40 pixels"),
        ([float("nan"), 0, 5, 5], "has no area"),
    ],
)
def test_a_box_that_cannot_be_followed_is_refused(box: list[float], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        TrackState(image(), torch.tensor(box), SETTINGS)


def test_a_box_partly_outside_is_followed() -> None:
    state = TrackState(image(), torch.tensor([-5.0, -5.0, 10.0, 10.0]), SETTINGS)
    assert state.box.tolist() == [0, 0, 10, 10]


def test_settings_go_through_json() -> None:
    settings = CropSettings((16, 24), (32, 48), search_factor=5.0, normalize="imagenet")
    assert CropSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(DataError, match="tells no crops of a tracker"):
        CropSettings.from_dict({"resolution": 3})


def test_the_window_is_symmetric_and_zero_at_its_border() -> None:
    window = hann_window((5, 7))
    assert window.shape == (5, 7)
    assert float(window[0].abs().max()) == float(window[:, -1].abs().max()) == 0.0
    assert float(window[2, 3]) == 1.0
    torch.testing.assert_close(window, window.flip(0, 1))


def test_the_window_decides_and_the_confidence_does_not_know_it() -> None:
    scores = torch.full((1, 5, 5), -9.0)
    scores[0, 0, 0], scores[0, 2, 2] = 1.0, 0.9
    centres = cell_centres(scores)
    output = TrackingOutput(scores, boxes_around(centres, torch.full((1, 5, 5, 4), 0.1)))
    plain, _ = select_box(output, (50, 100), None, 0.45)
    windowed, confidence = select_box(output, (50, 100), hann_window((5, 5)), 0.45)
    torch.testing.assert_close(plain[0], torch.tensor([0.0, 0.0, 20.0, 10.0]))
    torch.testing.assert_close(windowed[0], torch.tensor([40.0, 20.0, 60.0, 30.0]))
    torch.testing.assert_close(confidence, torch.tensor([0.9]).sigmoid())


def test_losses_are_divided_by_the_positive_cells_of_the_batch() -> None:
    scores = torch.zeros(2, 4, 4, requires_grad=True)
    boxes = boxes_around(cell_centres(scores.detach()), torch.full((2, 4, 4, 4), 0.125))
    targets = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 16.0, 8.0]])
    losses = tracking_losses(TrackingOutput(scores, boxes), targets, (32, 32))
    # 1 + 2 positive cells; BCE at 0 is log 2 for any label.
    assert losses["loss_cls"].item() == pytest.approx(32 * 0.6931472 / 3, rel=1e-5)
    # The first cell's box is the first target; either cell of the second covers one half of it.
    assert losses["loss_box"].item() == pytest.approx((0 + 0.5 + 0.5) / 3, rel=1e-5)


def test_the_score_learns_the_iou_without_moving_the_box() -> None:
    scores = torch.zeros(1, 2, 2, requires_grad=True)
    boxes = torch.tensor([0.0, 0.0, 0.5, 0.25]).expand(1, 2, 2, 4).clone().requires_grad_()
    losses = tracking_losses(TrackingOutput(scores, boxes), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), (32, 32))
    losses["loss_cls"].backward()
    assert boxes.grad is None
    # sigmoid(0) - label: 0.5 - 0.5 at the positive cell, 0.5 at the others.
    torch.testing.assert_close(scores.grad, torch.tensor([[[0.0, 0.5], [0.5, 0.5]]]))


def test_overlaps_of_apart_and_equal_boxes() -> None:
    one, apart = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    assert float(iou(one, one)) == float(generalised_iou(one, one)) == 1.0
    assert float(iou(one, apart)) == 0.0
    assert float(generalised_iou(one, apart)) == pytest.approx(-1 / 3)
    empty = torch.zeros(4)
    assert bool(torch.stack([iou(empty, empty), generalised_iou(empty, empty)]).isfinite().all())


def test_the_head_starts_small_and_needs_a_map() -> None:
    head = TrackingMLP(FeatureSpec(width=64, layout=None, levels=(64,)))
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert all(not bool(linear.bias.any()) for linear in linears)
    assert linears[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ConfigError, match="tracking_mlp"):
        TrackingMLP(FeatureSpec(width=64, layout=None))


def test_sizes_are_one_number_or_two() -> None:
    assert size_of(3, "x") == (3, 3)
    assert size_of([3, 4], "x") == (3, 4)
    with pytest.raises(ConfigError, match=r"backbone\.size: a size is one number"):
        size_of([1, 2, 3], "backbone.size")


def test_clipping_leaves_nothing_of_a_box_outside() -> None:
    assert not bool(is_box(clipped(torch.tensor([-5.0, 3, -1, 9]), (40, 60))))
