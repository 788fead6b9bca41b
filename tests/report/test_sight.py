"""What the network sees of a few samples."""

import torch

from peft_modal.tasks.sight import SightCollector


def collected(size, *views):
    collector = SightCollector(*views, seed=0)
    for x in torch.arange(12.0).view(12, 1).split(size):
        collector.add({"x": x, "name": ["a"] * len(x)}, None)
    return collector.sections()


def test_a_draw_does_not_depend_on_the_batches():
    views = (lambda sample: {"own": {"x": sample["x"]}}, lambda sample: {"method": {"x": -sample["x"]}})
    (small,), (large,) = collected(1, *views), collected(5, *views)

    assert small.to_dict() == large.to_dict()
    assert "among 12 samples" in small.lead
    for gallery in small.blocks:
        index = float(gallery.title.split()[1])
        assert [(tile.title, float(tile.sample["x"])) for tile in gallery.tiles] == [("own", index), ("method", -index)]


def test_there_is_no_section_where_nothing_is_seen():
    assert collected(5, lambda _: {}) == ()
    assert SightCollector(lambda _: {"own": {}}, seed=0).sections() == ()
