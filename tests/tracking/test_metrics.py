"""Metrics: the thresholds and exclusions by which toolkits differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_modal.errors import DataError
from peft_modal_tracking.metrics import Result, got10k, lasot_official, mean_scores, one_pass, trackingnet

SIZE = (100, 200)


def boxes(count: int) -> Tensor:
    step = torch.arange(count, dtype=torch.float32)
    return torch.stack([10 + step, 20 + step, torch.full_like(step, 30), torch.full_like(step, 15)], 1)


def result(predicted: Tensor, target: Tensor, visible: list[int] | None = None) -> Result:
    seen = torch.ones(len(target)) if visible is None else torch.tensor(visible)
    return Result(predicted, target, seen.bool(), SIZE)


def test_a_perfect_tracker_reaches_twenty_of_twenty_one() -> None:
    figures = one_pass(result(boxes(8), boxes(8))).figures
    assert figures["success_auc"] == pytest.approx(20 / 21)
    assert figures["precision"] == figures["normalised_precision"] == 1.0


def test_precision_counts_twenty_pixels_themselves() -> None:
    moved = boxes(4)
    moved[1, 0] += 20
    moved[2, 0] += 20.5
    assert one_pass(result(moved, boxes(4))).figures["precision"] == 0.75


def test_normalised_precision_divides_by_the_targets_own_sides() -> None:
    moved = boxes(4)
    moved[1, 0] += 5.9  # of 30
    moved[2, 1] += 3.1  # of 15
    assert one_pass(result(moved, boxes(4))).figures["normalised_precision"] == 0.75


def test_frames_without_a_target_stay_in_the_denominator() -> None:
    target = boxes(4)
    target[3, 2:] = 0
    figures = one_pass(result(boxes(4), target)).figures
    assert figures["success_auc"] == pytest.approx(0.75 * 20 / 21)
    assert figures["precision"] == 0.75
    assert figures["normalised_precision"] == 1.0  # counts as a hit


def test_absent_frames_are_misses_by_lasots_rules_only() -> None:
    pair = result(boxes(4), boxes(4), [1, 1, 1, 0])
    assert one_pass(pair).figures["precision"] == 1.0
    strict = one_pass(pair, "lasot").figures
    assert strict["precision"] == strict["normalised_precision"] == 0.75
    assert lasot_official(pair).figures["precision"] == 0.75


def test_lasots_toolkit_repeats_a_box_without_a_size() -> None:
    predicted = boxes(3)
    predicted[2] = torch.tensor([0.0, 0, 0, 0])
    assert lasot_official(result(predicted, boxes(3))).figures["precision"] == 1.0
    assert one_pass(result(predicted, boxes(3))).figures["precision"] == pytest.approx(2 / 3)


def test_got10k_pools_frames_and_drops_the_first_and_the_absent() -> None:
    long, short = boxes(11), boxes(2)
    wrong = boxes(11) + torch.tensor([1000.0, 0, 0, 0])
    figures, curve = got10k([result(wrong, long), result(short, short)])
    assert figures["ao"] == pytest.approx(1 / 11)  # a mean of sequences would be 1/2
    assert figures["sr50"] == pytest.approx(1 / 11)
    assert curve.shape == (101,)
    hidden, _ = got10k([result(wrong, long, [1] + [0] * 10), result(short, short)])
    assert hidden["ao"] == pytest.approx(1.0)


def test_got10k_clips_boxes_to_the_frame() -> None:
    target = torch.tensor([[190.0, 0, 10, 10], [190.0, 0, 10, 10]])
    predicted = torch.tensor([[190.0, 0, 10, 10], [190.0, 0, 500, 10]])
    assert got10k([result(predicted, target)])[0]["ao"] == pytest.approx(1.0)


def test_trackingnets_precision_is_an_area() -> None:
    moved = boxes(2)
    moved[1, 0] += 25
    figures = trackingnet([result(moved, boxes(2))])
    assert figures["coverage"] == 100
    # One frame exact, one 25 pixels off: the curve rises to 1 at 25 of 50 pixels.
    assert figures["precision"] == pytest.approx(100 * (0.5 + 0.5 * (0.5 + 0.025)), abs=0.1)
    assert trackingnet([result(boxes(2), boxes(2))])["success"] == pytest.approx(100)


def test_trackingnet_rounds_to_whole_pixels() -> None:
    nearly = boxes(3) + torch.tensor([0.4, -0.4, 0.3, 0.2])
    assert trackingnet([result(nearly, boxes(3))])["success"] == pytest.approx(100)


def test_sequences_count_alike_whatever_their_length() -> None:
    wrong = boxes(100) + torch.tensor([1000.0, 0, 0, 0])
    found = mean_scores([one_pass(result(boxes(2), boxes(2))), one_pass(result(wrong, boxes(100)))])
    assert found.figures["success_auc"] == pytest.approx(10 / 21)


def test_what_is_not_a_number_is_raised() -> None:
    broken = boxes(3)
    broken[1, 0] = float("nan")
    with pytest.raises(DataError, match="not a number"):
        result(broken, boxes(3))
    with pytest.raises(DataError, match="2 boxes were predicted for 3 frames"):
        result(boxes(2), boxes(3))
