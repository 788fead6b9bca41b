"""A few samples of each class."""

import pytest

from peft_modal.data.shots import draw_per_class
from peft_modal.errors import DataError

LABELS = [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]


def draw(count, *, seed=0, labels=LABELS, names=("a", "b")):
    return draw_per_class(labels, names, count, seed=seed, where="'here'", asked="data.shots")


def test_each_class_gives_as_many_and_the_draw_follows_from_the_seed():
    drawn = draw(3)
    assert [[LABELS[i] for i in places] for places in drawn] == [[0] * 3, [1] * 3]
    assert all(len(set(places)) == 3 for places in drawn)
    assert draw(3) == drawn
    assert len({str(draw(3, seed=seed)) for seed in range(5)}) > 1


def test_more_shots_include_the_fewer():
    assert [places[:2] for places in draw(4)] == draw(2)


def test_another_class_does_not_change_the_draw():
    more = [*LABELS, 2, 2, 2]
    assert draw(3, labels=more, names=("a", "b", "c"))[:2] == draw(3)


def test_a_class_with_fewer_is_named():
    with pytest.raises(
        DataError, match=r"'here': class 'b' has 4 samples to train on, data\.shots asks for 5; lower it"
    ):
        draw(5)
