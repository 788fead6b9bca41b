import math
import pickle  # noqa: TID251  what a DataLoader does under the spawn method

import pytest
import torch

from peft_modal.errors import ConfigError
from peft_modal_pointcloud.augment import (
    AUGMENTATIONS,
    batch_rotate,
    build_augment,
    jitter,
    narrow_scale,
    rotate,
    scale_translate,
    unit,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(6, 50, 3, generator=generator(9))


def test_rotate_multiplies_rows_by_the_matrix_of_the_formula(points):
    angles = 2 * math.pi * torch.rand(6, generator=generator(3))
    turned = rotate(points, generator(3))
    for cloud, result, a in zip(points, turned, angles.tolist(), strict=True):
        matrix = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
        torch.testing.assert_close(result, cloud @ matrix, atol=1e-5, rtol=1e-5)


def test_rotate_keeps_heights_and_distances_from_the_axis(points):
    turned = rotate(points, generator())
    assert torch.equal(turned[..., 1], points[..., 1])
    torch.testing.assert_close(turned[..., [0, 2]].norm(dim=-1), points[..., [0, 2]].norm(dim=-1))


def test_angles_differ_between_clouds_and_cover_the_circle():
    x = torch.tensor([1.0, 0.0, 0.0]).expand(400, 1, 3)
    turned = rotate(x, generator())[:, 0]
    angle = torch.atan2(turned[:, 2], turned[:, 0])
    assert angle.min() < -3
    assert angle.max() > 3
    assert angle.mean().abs() < 0.3


def test_scale_translate_draws_one_scale_and_shift_per_cloud_and_axis(points):
    result = scale_translate(points, generator())
    for axis in range(3):
        for cloud, out in zip(points[..., axis], result[..., axis], strict=True):
            s = (out[1] - out[0]) / (cloud[1] - cloud[0])
            t = out[0] - s * cloud[0]
            torch.testing.assert_close(out, s * cloud + t, atol=1e-4, rtol=1e-4)


def test_the_ranges_of_scale_and_shift_are_those_of_point_bert():
    pair = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).expand(3000, 2, 3)
    out = scale_translate(pair, generator())
    shift, scale = out[:, 0], out[:, 1] - out[:, 0]
    for value, low, high in ((scale, 2 / 3, 3 / 2), (shift, -0.2, 0.2)):
        assert low - 1e-5 <= value.min() < low + 0.01
        assert high - 0.01 < value.max() <= high + 1e-5
        torch.testing.assert_close(value.mean(0), torch.full((3,), (low + high) / 2), atol=0.02, rtol=0)
    assert torch.corrcoef(scale.T)[0, 1].abs() < 0.1


def test_jitter_is_small_and_clipped(points):
    noise = jitter(points, generator(), sigma=0.03, limit=0.05) - points
    assert noise.abs().max() <= 0.05 + 1e-6
    assert float(noise.std()) == pytest.approx(0.027, abs=0.003)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_an_augmentation_returns_new_points_from_the_given_generator_alone(name, points):
    stored, global_state = points.clone(), torch.get_rng_state()
    first = AUGMENTATIONS[name](points, generator(1))
    assert torch.equal(points, stored)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert first.dtype == torch.float32
    assert torch.equal(first, AUGMENTATIONS[name](points, generator(1)))
    assert not torch.equal(first, AUGMENTATIONS[name](points, generator(2)))


def test_names_are_applied_in_their_order_with_one_generator(points):
    g = generator(5)
    expected = rotate(scale_translate(points, g), g)
    assert torch.equal(build_augment(["scale_translate", "rotate"])(points, generator(5)), expected)
    assert not torch.equal(build_augment(["rotate", "scale_translate"])(points, generator(5)), expected)


def test_no_name_leaves_the_points_alone(points):
    assert torch.equal(build_augment([])(points, generator()), points)


def test_every_unknown_name_is_reported_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        build_augment(["rotat", "jitter", "blur"])
    assert len(caught.value.problems) == 2
    assert "'rotat': did you mean 'rotate'" in caught.value.problems[0]
    assert "known: batch_rotate, batch_scale_translate, jitter, narrow_scale, rotate, scale" in caught.value.problems[1]


def test_a_chain_can_be_sent_to_a_worker_process(points):
    chain = build_augment(["rotate", "jitter"])
    copy = pickle.loads(pickle.dumps(chain))
    assert torch.equal(copy(points, generator()), chain(points, generator()))


def test_unit_centres_by_the_mean_and_scales_by_the_farthest_point(points):
    shifted = points * 7 + 3
    stored = shifted.clone()
    result = unit(shifted)
    assert torch.equal(shifted, stored)
    centred = shifted[2] - shifted[2].mean(0)
    torch.testing.assert_close(result[2], centred / centred.norm(dim=1).max())
    torch.testing.assert_close(unit(shifted[2]), result[2])


def test_unit_of_a_single_point_is_zero_and_not_nan():
    assert torch.equal(unit(torch.full((1, 3), 5.0)), torch.zeros(1, 3))


def test_batch_rotate_turns_all_clouds_by_one_angle(points):
    turned = batch_rotate(points, generator(3))
    torch.testing.assert_close(turned[:1], rotate(points[:1], generator(3)))
    torch.testing.assert_close(batch_rotate(points[:1].expand(6, -1, -1), generator(3)), turned[:1].expand(6, -1, -1))


def test_narrow_scale_stretches_axes_by_at_most_a_tenth():
    ones = torch.ones(500, 2, 3)
    scaled = narrow_scale(ones, generator())
    assert torch.equal(scaled[:, 0], scaled[:, 1])
    assert 0.9 <= scaled.min() < 0.91
    assert 1.09 < scaled.max() <= 1.1
    assert not torch.equal(scaled[..., 0], scaled[..., 1])
