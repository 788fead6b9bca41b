import re

import pytest
import torch

from peft_modal.data.drawn import COLOURS, GROUNDS, HELD_OUT, SHAPES
from peft_modal.errors import ConfigError
from peft_modal_clip.data import DrawnPairs, normalized

PAIR = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
TONES = torch.tensor(list(GROUNDS.values())).flatten(0, 1)


def source(**arguments):
    data = DrawnPairs(**{"batch_size": 48, "batches": 6, "val_per_pair": 1, **arguments})
    data.setup("fit")
    return data, data.train_source(data._sets["train"])


def grounds(batch) -> set[int]:
    """Places in GROUNDS of what lies in the pictures' corners."""
    corners = (batch["image"] * 0.5 + 0.5)[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].transpose(1, 2).flatten(0, 1)
    distance, nearest = torch.cdist(corners, TONES).min(1)
    return set((nearest[distance < 0.02] // 2).tolist())


def test_batches_follow_from_seed_epoch_and_place():
    _, one = source()
    _, two = source()
    _, other = source(seed=1)
    assert len(one) == 6
    first = one.batch(1, 2)
    assert first["image"].shape == (48, 3, 32, 32)
    assert torch.equal(first["image"], two.batch(1, 2)["image"])
    assert first["caption"] == two.batch(1, 2)["caption"]
    for unlike in (one.batch(1, 3), one.batch(0, 2), other.batch(1, 2)):
        assert unlike["caption"] != first["caption"]


def test_training_never_names_a_held_out_pair():
    _, batches = source()
    named = {pair for i in range(6) for caption in batches.batch(0, i)["caption"] for pair in PAIR.findall(caption)}
    assert not named & set(HELD_OUT)
    assert len(named) == 40


def test_two_of_three_batches_have_one_background_and_one_of_them_one_colour():
    _, batches = source()
    for index in range(6):
        batch = batches.batch(0, index)
        colours = {PAIR.search(caption)[1] for caption in batch["caption"]}
        assert (len(grounds(batch)) == 1) == (index % 3 > 0)
        assert (len(colours) == 1) == (index % 3 == 2)


def test_grouping_can_be_left_out():
    _, batches = source(grouped=False)
    assert all(len(grounds(batches.batch(0, index))) == len(GROUNDS) for index in range(3))


def test_evaluation_shows_every_pair_equally_often_and_says_which_were_held_out():
    data, _ = source(val_per_pair=2)
    samples = [data._sets["val"][i] for i in range(len(data._sets["val"]))]
    assert len(samples) == 96
    for sample in samples:
        name = data.class_names[sample["label"]]
        assert PAIR.search(name).groups() == PAIR.search(sample["caption"]).groups()
        assert bool(sample["held_out"]) == (PAIR.search(name).groups() in HELD_OUT)
    labels = torch.tensor([sample["label"] for sample in samples])
    assert torch.bincount(labels).tolist() == [2] * 48
    assert labels[:48].unique().numel() > 24
    assert data.class_names[:2] == ("a red circle", "a red square")
    assert data.class_names_without_data({}) == data.class_names


def test_test_pictures_do_not_depend_on_the_seed_and_validation_pictures_do():
    sets = []
    for seed in (0, 1):
        data = DrawnPairs(val_per_pair=1, test_per_pair=1, seed=seed)
        data.setup("fit")
        data.setup("test")
        sets.append(data._sets)
    assert torch.equal(sets[0]["test"].images, sets[1]["test"].images)
    assert not torch.equal(sets[0]["val"].images, sets[1]["val"].images)
    assert not torch.equal(sets[0]["val"].images, sets[0]["test"].images)


def test_loaders_collate_captions():
    data, _ = source()
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (48, 3, 32, 32)
    assert len(batch["caption"]) == 48
    assert batch["held_out"].dtype == torch.bool


def test_pictures_are_normalised():
    images = torch.full((1, 3, 2, 2), 0.5)
    assert torch.equal(normalized(images, "half"), torch.zeros(1, 3, 2, 2))
    assert normalized(images, "clip")[0, 0, 0, 0].item() == pytest.approx((0.5 - 0.48145466) / 0.26862954)
    _, batches = source()
    assert -1 <= float(batches.batch(0, 0)["image"].min()) < -0.7


def test_an_unknown_normalisation_is_named():
    with pytest.raises(ConfigError, match="normalize is 'imagenet'"):
        DrawnPairs(normalize="imagenet")
