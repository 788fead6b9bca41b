"""Generated videos and training pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from peft_modal.errors import DataError
from peft_modal_tracking.boxes import clipped
from peft_modal_tracking.data import MovingObjects
from peft_modal_tracking.moving import draw_videos
from peft_modal_tracking.pairs import Group, Jitter, PairBatches, Recolouring, draw_frames, make_pair, search_map
from peft_modal_tracking.sequences import StoredFrames, Video
from peft_modal_tracking.steps import CropSettings
from peft_modal_vision.patterns import DOWNSTREAM, PRETRAIN

SETTINGS = CropSettings((16, 16), (32, 32))


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    return draw_videos(8, 40, (48, 64), DOWNSTREAM, Generator().manual_seed(3))


def still(frames: int = 6, side: int = 48, **options: Any) -> Video:
    """A grey square of 10 pixels on black that moves a pixel to the right in each frame."""
    pixels = torch.zeros(frames, 3, side, side, dtype=torch.uint8)
    for i in range(frames):
        pixels[i, :, 20:30, 15 + i : 25 + i] = 200
    boxes = torch.tensor([[15.0 + i, 20, 10, 10] for i in range(frames)])
    return Video("still", StoredFrames(pixels), boxes, **options)


def test_videos_are_of_the_asked_size_and_differ_by_seed(drawn: dict[str, Tensor]) -> None:
    assert drawn["frames"].shape == (8, 40, 3, 48, 64)
    again = draw_videos(8, 40, (48, 64), DOWNSTREAM, Generator().manual_seed(3))
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)
    other = draw_videos(8, 40, (48, 64), DOWNSTREAM, Generator().manual_seed(4))
    assert not torch.equal(other["frames"], drawn["frames"])


def test_videos_have_what_trackers_fail_on(drawn: dict[str, Tensor]) -> None:
    boxes, share = drawn["boxes"], drawn["share"]
    assert bool((share[:, 0] > 0.9).all()), "the target is to be seen in the first frame"
    assert bool((boxes[3::4, 20:, 2] == 0).any(1).all()), "every fourth leaves the frame"
    has_size = boxes[..., 2] > 0
    touches = (boxes[..., 0] == 0) | (boxes[..., 0] + boxes[..., 2] == 64) | (boxes[..., 1] + boxes[..., 3] == 48)
    assert bool((touches & has_size).any()), "some stand at the border"
    assert float(boxes[5, 0, 2:].max()) < 10, "one is tiny"
    hidden = (share < 0.5) & has_size & ~touches
    assert bool(hidden.any()), "something passes in front"


def test_boxes_enclose_what_moved() -> None:
    """Where the target is the only thing that changes, the change lies in its boxes."""
    made = draw_videos(1, 12, (48, 64), PRETRAIN, Generator().manual_seed(0))
    box = made["boxes"][0]
    assert bool(((box[:, :2] >= 0) & (box[:, :2] + box[:, 2:] <= torch.tensor([64, 48]))).all())
    centres = box[:, :2] + box[:, 2:] / 2
    steps = (centres[1:] - centres[:-1]).norm(dim=1)
    assert 0 < float(steps.max()) < 10, "smooth, and it does move"


def test_pretraining_has_other_things_and_motions() -> None:
    assert not set(DOWNSTREAM.shapes) & set(PRETRAIN.shapes)
    assert not set(DOWNSTREAM.textures) & set(PRETRAIN.textures)
    straight = draw_videos(4, 20, (48, 64), PRETRAIN, Generator().manual_seed(1))["boxes"]
    centres = straight[:3, 2:8, :2] + straight[:3, 2:8, 2:] / 2
    bend = (centres[:, 2:] - 2 * centres[:, 1:-1] + centres[:, :-2]).norm(dim=-1).median()
    assert float(bend) < 1.5, "straight but for rounding"


def test_data_is_kept_in_the_cache_and_test_videos_do_not_depend_on_the_seed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path))
    options = {"videos": 3, "val_videos": 2, "test_videos": 2, "frames": 6, "frame_size": (32, 48), "pairs": 8}
    sets = {}
    for seed in (0, 1):
        data = MovingObjects(seed=seed, batch_size=4, **options)
        for part in ("train", "val", "test"):
            sets[part, seed] = data.load(part)
    assert len(list(tmp_path.glob("moving-objects-*.safetensors"))) == 5
    same = [torch.equal(sets[part, 0][0].frames[0], sets[part, 1][0].frames[0]) for part in ("train", "val", "test")]
    assert same == [False, False, True]


def test_batches_follow_from_seed_epoch_and_place() -> None:
    def source(seed: int = 0) -> PairBatches:
        return PairBatches(
            [Group([still()])], SETTINGS, pairs=8, batch_size=4, jitter=Jitter(min_visible=3), max_gap=100,
            recolouring=Recolouring(), seed=seed,
        )  # fmt: skip

    one, again = source().batch(1, 1), source().batch(1, 1)
    assert len(source()) == 2
    assert all(torch.equal(one[name], again[name]) for name in one)
    for other in (source().batch(1, 0), source().batch(0, 1), source(1).batch(1, 1)):
        assert not torch.equal(one["search"], other["search"])
    assert {name: tuple(value.shape) for name, value in one.items()} == {
        "template": (4, 3, 16, 16), "search": (4, 3, 32, 32), "template_box": (4, 4), "target": (4, 4),
    }  # fmt: skip


def test_the_box_lies_where_the_target_is_shown() -> None:
    """Jittered or not, mirrored or not: what is inside the box is the square, and only that."""
    generator = Generator().manual_seed(0)
    for _ in range(30):
        made = make_pair(still(), 0, 3, SETTINGS, Jitter(shift=1, min_visible=6), generator)
        assert made is not None
        inside = clipped(made["target"], (32, 32))
        shown = (made["search"][0] > -0.2).nonzero()
        found = torch.tensor([shown[:, 1].min(), shown[:, 0].min(), shown[:, 1].max() + 1, shown[:, 0].max() + 1])
        assert float((found - inside).abs().max()) <= 1.6


def test_mirroring_turns_box_and_picture_together() -> None:
    generator = Generator().manual_seed(0)
    plain = make_pair(still(), 0, 3, SETTINGS, None, generator)
    assert plain is not None
    lefts = set()
    for _ in range(20):
        made = make_pair(still(), 0, 3, SETTINGS, Jitter(scale=0, shift=1, min_visible=6), generator, Recolouring())
        assert made is not None
        bright = made["search"].mean(0)
        box = clipped(made["target"], (32, 32)).round().long()
        inside = bright[box[1] + 1 : box[3] - 1, box[0] + 1 : box[2] - 1].mean()
        assert abs(float(inside - bright.median())) > 0.05
        lefts.add(float(made["target"][0]))
    assert len(lefts) > 10


def test_template_and_search_picture_share_one_change() -> None:
    generator = Generator().manual_seed(1)
    coloured = Video("c", StoredFrames((torch.rand(2, 3, 48, 48) * 255).to(torch.uint8)), still(2).boxes)
    grey = []
    for _ in range(40):
        made = make_pair(coloured, 0, 1, SETTINGS, None, generator, Recolouring())
        assert made is not None
        flags = [float((made[name][0] - made[name][2]).abs().max()) < 1e-6 for name in ("template", "search")]
        assert flags[0] == flags[1]
        grey.append(flags[0])
    assert 0 < sum(grey) < 40


def test_the_scales_of_both_axes_are_jittered_apart() -> None:
    generator = Generator().manual_seed(0)
    box = torch.tensor([15.0, 20, 25, 30])
    maps = [search_map(box, SETTINGS, Jitter(min_visible=1), generator) for _ in range(400)]
    plain = search_map(box, SETTINGS, None, generator)
    assert plain is not None
    logs = torch.stack([(m.scale / plain.scale).log() for m in maps if m is not None])
    assert logs.std(0).tolist() == pytest.approx([0.25, 0.25], abs=0.04)
    assert abs(float(torch.corrcoef(logs.T)[0, 1])) < 0.2


def test_a_target_is_at_least_so_large_in_its_search_picture() -> None:
    generator = Generator().manual_seed(0)
    box = torch.tensor([15.0, 20, 25, 30])
    for _ in range(100):
        found = search_map(box, SETTINGS, Jitter(min_visible=6), generator)
        if found is not None:
            inside = clipped(found.to_crop(box), (32, 32))
            assert float((inside[2:] - inside[:2]).min()) >= 6
    assert search_map(box, SETTINGS, Jitter(min_visible=31), generator) is None


def test_frames_of_a_pair_show_the_target_and_lie_near_each_other() -> None:
    visible = torch.tensor([1, 0, 1, 1, 0, 1])
    video = still(visible=visible)
    generator = Generator().manual_seed(0)
    drawn = {draw_frames(video, 2, generator) for _ in range(200)}
    assert drawn == {(0, 2), (2, 0), (2, 3), (3, 2), (3, 5), (5, 3)}
    assert {draw_frames(still(visible=torch.tensor([0, 0, 1, 0, 0, 0])), 9, generator)} == {(2, 2)}


def test_sequences_come_without_replacement_and_groups_by_weight() -> None:
    groups = [Group([still() for _ in range(10)], 3.0), Group([still()], 1.0)]
    source = PairBatches(
        groups, SETTINGS, pairs=40, batch_size=40, jitter=Jitter(min_visible=3), max_gap=9, recolouring=None, seed=0
    )
    seen: list[tuple[int, int]] = []

    def note(videos: Any, place: int, generator: Any) -> dict[str, Tensor]:
        del generator
        seen.append((len(videos), place))
        return {"template": torch.zeros(1)}

    source._pair = note  # type: ignore[method-assign, assignment]
    source.batch(0, 0)
    first = [place for size, place in seen if size == 10]
    assert sorted(first[:10]) == list(range(10))
    assert 20 <= len(first) <= 38


def test_data_without_a_visible_target_is_refused() -> None:
    options: Any = {"pairs": 1, "batch_size": 1, "max_gap": 9, "recolouring": None, "seed": 0}
    with pytest.raises(DataError, match="no frame of the training sequences shows its target"):
        PairBatches([Group([still(visible=torch.zeros(6))])], SETTINGS, jitter=Jitter(), **options)
    with pytest.raises(DataError, match=r"lower data\.min_visible"):
        PairBatches([Group([still()])], SETTINGS, jitter=Jitter(min_visible=31), **options).batch(0, 0)


def test_moments_can_be_left_out() -> None:
    """The same video, of which only some frames are shown; noise and boxes of what is hidden are drawn anew."""
    whole = draw_videos(2, 12, (48, 64), DOWNSTREAM, Generator().manual_seed(5))
    some = draw_videos(2, 3, (48, 64), DOWNSTREAM, Generator().manual_seed(5), every=4)
    assert torch.equal(some["boxes"], whole["boxes"][:, ::4])
    difference = (some["frames"].float() - whole["frames"][:, ::4].float()).abs()
    assert float(difference.max()) < 60, "noise only"
    assert float(difference.mean()) < 10
