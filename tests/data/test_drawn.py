import math
import re

import pytest
import torch
from torch.nn import functional

from peft_modal.data.drawn import (
    COLOURS,
    CONCEPT_WORDS,
    GROUNDS,
    HELD_OUT,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Drawn,
    draw_open_ended,
    draw_scenes,
    draw_style,
    draw_subject,
    paint_scenes,
    pair_mask,
    plan_scenes,
    with_article,
)
from peft_modal.data.drawn.distances import SHAPE_DISTANCES, coverage, grid
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError

RGB = torch.tensor(list(COLOURS.values()))
AREAS = {"circle": math.pi, "square": 1.7**2, "triangle": 1.8, "cross": 2.31, "diamond": 1.76, "ring": 0.8 * math.pi}
DRAWERS = {
    "scenes": lambda count, generator: draw_scenes(count, generator).images,
    "open_ended": draw_open_ended,
    "subject": lambda count, generator: draw_subject(count, generator).images,
    "style": lambda count, generator: draw_style(count, generator).images,
}
# What version 1 of the generator draws: shipped networks were trained on these pictures.
MEANS = {"scenes": 0.45293, "open_ended": 0.50165, "subject": 0.54555, "style": 0.1121}
SIZE = "|".join(SIZES)
NAME = rf"an? (?:({SIZE}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
GROUND = (
    rf"on an? (?:({'|'.join(PATTERNS)}) )?({'|'.join(GROUNDS)}) background"
    rf"(?: with ({'|'.join(noun for noun in PATTERNS.values() if noun)}))?"
)
CAPTION = re.compile(
    rf"(?:a picture of |a photo of |there is )?{NAME}"
    rf"(?: (?:to the )?({'|'.join(RELATIONS)}|and) (?:of )?{NAME})?"
    rf"(?: ({'|'.join(PLACES)}))?(?: {GROUND})?"
)


@pytest.fixture(scope="module")
def scenes() -> Drawn:
    return draw_scenes(600, seeded("scenes"))


def pairs_of(drawn: Drawn) -> set[tuple[str, str]]:
    assert drawn.scenes is not None
    numbers = torch.stack([drawn.scenes.colour, drawn.scenes.shape], dim=-1).flatten(0, 1).tolist()
    return {(list(COLOURS)[colour], SHAPES[shape]) for colour, shape in numbers if shape >= 0}


@pytest.mark.parametrize("name", DRAWERS)
def test_the_same_seed_draws_the_same_pictures(name):
    first, second, other = (DRAWERS[name](40, seeded("drawn", seed)) for seed in (0, 0, 1))
    assert first.shape == (40, 3, 32, 32)
    assert first.dtype == torch.float32
    assert 0 <= float(first.min()) < float(first.max()) <= 1
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert float(first.mean()) == pytest.approx(MEANS[name], abs=1e-4)


def test_every_colour_loses_one_shape_and_every_shape_is_still_trained():
    mask = pair_mask("train")
    assert len(HELD_OUT) == 8
    assert mask.sum(1).tolist() == [len(SHAPES) - 1] * len(COLOURS)
    assert mask.sum(0).min() >= 5
    assert torch.equal(mask, ~pair_mask("held_out"))


def test_pictures_for_training_have_no_held_out_pair_in_either_place(scenes):
    assert pairs_of(scenes) == {(c, s) for c in COLOURS for s in SHAPES} - set(HELD_OUT)
    assert not pairs_of(draw_style(200, seeded("style"))) & set(HELD_OUT)


def test_held_out_pictures_have_nothing_else():
    assert pairs_of(draw_scenes(200, seeded("held out"), pairs="held_out")) == set(HELD_OUT)


def test_pictures_show_one_or_two_different_objects(scenes):
    two = scenes.scenes.relation >= 0
    assert 0.4 < float(two.float().mean()) < 0.6
    assert torch.equal(two, scenes.scenes.place < 0)
    assert torch.equal(two, scenes.scenes.shape[:, 1] >= 0)
    numbers = scenes.scenes.colour * len(SHAPES) + scenes.scenes.shape
    assert (numbers[:, 0] != numbers[:, 1]).all()


@pytest.mark.parametrize("objects", [1, 2])
def test_the_number_of_objects_can_be_chosen(objects):
    drawn = draw_scenes(50, seeded("objects"), objects=objects)
    assert ((drawn.scenes.shape >= 0).sum(1) == objects).all()


def test_parts_of_a_scene_can_be_given():
    shape = torch.arange(48) % 6
    drawn = draw_scenes(48, seeded("given"), objects=1, colour=torch.arange(48) // 6, shape=shape, pattern=2, ground=1)
    assert len(pairs_of(drawn)) == 48
    assert (drawn.scenes.backgrounds.pattern == 2).all()
    assert (drawn.scenes.backgrounds.ground == 1).all()
    given_shape = draw_scenes(48, seeded("given"), shape=shape)
    assert torch.equal(given_shape.scenes.shape[:, 0], shape)
    assert not pairs_of(given_shape) & set(HELD_OUT)
    rings = draw_scenes(30, seeded("given"), objects=1, pairs="held_out", shape=SHAPES.index("ring"))
    assert pairs_of(rings) == {("orange", "ring"), ("purple", "ring")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"colour": 8}, "colour is 8, expected numbers from 0 to 7"),
        ({"ground": -1}, "ground is -1"),
        ({"pairs": "some"}, "pairs is 'some'"),
    ],
)
def test_wrong_parts_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        draw_scenes(4, seeded(0), **arguments)


def test_captions_say_what_is_drawn(scenes):
    plan = scenes.scenes
    seen = {"size": 0, "relation": 0, "place": 0, "ground": 0, "short": 0}
    for i, caption in enumerate(scenes.captions):
        said = CAPTION.fullmatch(caption)
        assert said, caption
        objects = [(said[1], said[2], said[3]), (said[5], said[6], said[7])]
        for k, (size, colour, shape) in enumerate(objects):
            if plan.shape[i, k] < 0:
                assert shape is None
                continue
            assert (colour, shape) == (list(COLOURS)[plan.colour[i, k]], SHAPES[plan.shape[i, k]])
            assert size in {None, SIZES[plan.size[i, k]]}
            seen["size"] += size is not None
        if plan.relation[i] >= 0:
            assert said[4] == "and" or said[4] == RELATIONS[plan.relation[i]]
            seen["relation"] += said[4] != "and"
        if said[8] is not None:
            assert said[8] == PLACES[plan.place[i]]
            seen["place"] += 1
        if said[10] is not None:
            adjective, noun = list(PATTERNS.items())[plan.backgrounds.pattern[i]]
            assert said[10] == list(GROUNDS)[plan.backgrounds.ground[i]]
            assert (said[9], said[11]) in {(adjective, None), (None, noun or None)}
            seen["ground"] += 1
        seen["short"] += re.fullmatch(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption) is not None
        assert len(caption.split()) <= 18
    assert min(seen.values()) > 50, seen


@pytest.mark.parametrize(("words", "said"), [("orange ring", "an orange ring"), ("blue ring", "a blue ring")])
def test_articles(words, said):
    assert with_article(words) == said


def test_every_article_in_captions_is_right(scenes):
    for caption in scenes.captions:
        for article, initial in re.findall(r"\b(an?) (\w)", caption):
            assert (article == "an") == (initial in "aeiou"), caption


def test_pixels_have_the_named_colour_in_the_named_place(scenes):
    plan = scenes.scenes
    nearest = torch.cdist(scenes.images.permute(0, 2, 3, 1).flatten(0, 2), RGB)
    is_colour = (nearest < 0.1).reshape(len(scenes), 32, 32, len(COLOURS))
    x, y = grid(32)
    for i in range(len(scenes)):
        middles = {}
        for k in range(1 + int(plan.relation[i] >= 0)):
            colour, shape = int(plan.colour[i, k]), SHAPES[plan.shape[i, k]]
            found = is_colour[i, :, :, colour]
            area = AREAS[shape] * float(plan.radius[i, k] * 32) ** 2
            if plan.colour[i, 0] != plan.colour[i, 1]:
                # The rim's mixed pixels belong to no colour, and large objects may reach over the border a little.
                assert 0.4 * area < int(found.sum()) < 1.05 * area + 4, scenes.captions[i]
                middles[k] = [float(axis[found].min() + axis[found].max()) / 2 - 16 for axis in (x, y)]
        if plan.place[i] >= 0:
            assert direction(*middles[0], least=2.5) == int(plan.place[i])
        elif len(middles) == 2:
            gap = [a - b for a, b in zip(middles[0], middles[1], strict=True)]
            assert direction(*gap, least=10) == {0: 3, 1: 4, 2: 1, 3: 2}[int(plan.relation[i])]


def direction(x: float, y: float, *, least: float) -> int:
    """Place in PLACES of the main direction from the middle: 0 in the middle, 1 up, 2 down, 3 left, 4 right."""
    if max(abs(x), abs(y)) < least:
        return 0
    if abs(y) > abs(x):
        return 1 if y < 0 else 2
    return 3 if x < 0 else 4


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=SHAPES)
def test_shapes_cover_their_area_about_their_centre(number):
    x, y = grid(128)
    r = torch.tensor(50.0)
    cover = coverage(SHAPE_DISTANCES[number](x - 64, y - 64, r))
    assert float(cover.sum()) == pytest.approx(AREAS[SHAPES[number]] * 50**2, rel=0.01)
    edges = cover[0].sum() + cover[-1].sum() + cover[:, 0].sum() + cover[:, -1].sum()
    assert edges == 0
    assert torch.allclose(cover, cover.flip(1), atol=1e-4)


@pytest.mark.parametrize("side", [24, 64])
def test_a_scene_is_the_same_at_any_side(side):
    plan = plan_scenes(40, seeded("sides"))
    small = paint_scenes(plan, side)
    assert small.shape == (40, 3, side, side)
    reduced = functional.interpolate(paint_scenes(plan, 4 * side), scale_factor=0.25, mode="area")
    assert float((small - reduced).abs().mean()) < 0.01


def test_large_objects_are_larger(scenes):
    plan = scenes.scenes
    for two in (False, True):
        of = ((plan.relation >= 0) == two)[:, None] & (plan.size >= 0)
        small, large = (plan.radius[of & (plan.size == size)] for size in (0, 1))
        assert float(large.min()) > 1.1 * float(small.max())


def test_no_other_picture_uses_the_words_of_the_concepts(scenes):
    words = {word for caption in scenes.captions for word in re.findall(r"\w+", caption)}
    assert not words & set(CONCEPT_WORDS)
    assert all("sks creature" in caption for caption in draw_subject(30, seeded(0)).captions)
    assert all(
        re.match(r"zwx style, (there is )?an? ", c) for c in draw_style(30, seeded(0), prefix="zwx style").captions
    )


def test_no_scene_has_the_colours_of_the_subject_and_every_subject_has(scenes):
    body, horns = torch.tensor([0.62, 0.98, 0.68]), torch.tensor([0.98, 0.35, 0.62])

    def pixels_of(images, rgb):
        return ((images - rgb[:, None, None]).norm(dim=1) < 0.06).flatten(1).sum(1)

    subject = draw_subject(48, seeded("subject")).images
    assert int(pixels_of(subject, body).min()) > 40
    assert int(pixels_of(subject, horns).min()) >= 2
    assert int(pixels_of(scenes.images, body).max()) == 0


def test_neon_signs_are_bright_lines_in_the_dark():
    drawn = draw_style(60, seeded("neon"))
    level = drawn.images.amax(1)
    border = torch.cat([level[:, 0], level[:, -1]], dim=1)
    assert float(border.median()) < 0.06
    for i in range(60):
        if drawn.scenes.relation[i] < 0 and SHAPES[drawn.scenes.shape[i, 0]] in {"circle", "square"}:
            column, row = (drawn.scenes.centre[i, 0] * 32).long().tolist()
            assert float(level[i, row, column]) < 0.25
            assert float(level[i, row].max()) > 0.5


def test_open_ended_pictures_go_beyond_the_palette():
    images = draw_open_ended(80, seeded("open"), scene_share=0.0)
    tones = torch.tensor(list(GROUNDS.values())).flatten(0, 1)
    distances = torch.cdist(images.permute(0, 2, 3, 1).flatten(0, 2), torch.cat([RGB, tones]))
    is_new = (distances.amin(1) > 0.15).reshape(80, -1).float().mean(1)
    assert float(is_new.mean()) > 0.5
    scenes = draw_open_ended(80, seeded("open"), scene_share=1.0)
    distances = torch.cdist(scenes.permute(0, 2, 3, 1).flatten(0, 2), torch.cat([RGB, tones]))
    assert float((distances.amin(1) > 0.15).float().mean()) < 0.15


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_open_ended_pictures_can_be_drawn(count, share):
    assert draw_open_ended(count, seeded("few"), side=16, scene_share=share).shape == (count, 3, 16, 16)
