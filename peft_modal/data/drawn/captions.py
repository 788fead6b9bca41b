"""Captions of scenes in several wordings, up to 18 words long."""

from __future__ import annotations

from torch import Generator

from peft_modal.data.drawn.distances import integers
from peft_modal.data.drawn.scenes import Backgrounds, Scenes
from peft_modal.data.drawn.words import GROUNDS, PATTERNS, PLACES, RELATIONS, object_name, with_article

_OPENINGS = ("a picture of ", "a photo of ", "there is ")
_RELATIONS = {"left of": "to the left of", "right of": "to the right of"}
_DICE = 8
"""Throws that a caption's wording depends on, each 0..99."""


def caption_scenes(scenes: Scenes, generator: Generator, *, grounds: bool = True) -> tuple[str, ...]:
    """One caption for each scene: every word of it is true, and what it leaves out is left to chance.

    A quarter of them name the objects and nothing else (`a red circle`).

    Args:
        scenes: What the pictures show.
        generator: CPU generator, the only source of randomness.
        grounds: Tell of some backgrounds.
    """
    dice = integers(100, len(scenes), _DICE, generator=generator).tolist()
    tables = [field.tolist() for field in (scenes.colour, scenes.shape, scenes.size, scenes.place, scenes.relation)]
    pattern, ground = scenes.backgrounds.pattern.tolist(), scenes.backgrounds.ground.tolist()
    captions = []
    for i, throw in enumerate(dice):
        colour, shape, size, place, relation = (table[i] for table in tables)
        is_long = throw[0] >= 25
        names = [
            object_name(colour[k], shape[k], size[k] if is_long and throw[1 + k] < 35 else None)
            for k in (0, 1)
            if shape[k] >= 0
        ]
        background = background_phrase(pattern[i], ground[i], throw[3])
        parts = [names[0]]
        if relation >= 0:
            parts += [_relation_phrase(relation, throw[4]), names[1]]
        elif is_long and throw[4] < 50:
            parts.append(PLACES[place])
        has_ground = grounds and is_long and throw[5] < 50
        if has_ground:
            parts.append(background)
        # 18 words have to do: no opening before two objects and a background.
        has_opening = is_long and throw[6] < 45 and not (has_ground and relation >= 0)
        captions.append((_OPENINGS[throw[7] % len(_OPENINGS)] if has_opening else "") + " ".join(parts))
    return tuple(captions)


def background_phrase(pattern: int, ground: int, throw: int) -> str:
    """`on a striped white background` or `on a white background with stripes`; a throw of 0..99 decides."""
    (adjective, noun), name = list(PATTERNS.items())[pattern], list(GROUNDS)[ground]
    if throw < 50:
        return f"on {with_article(f'{adjective} {name} background')}"
    return f"on {with_article(f'{name} background')}" + (f" with {noun}" if noun else "")


def background_phrases(backgrounds: Backgrounds, generator: Generator) -> tuple[str, ...]:
    """A phrase for each background."""
    throws = integers(100, len(backgrounds.pattern), generator=generator).tolist()
    numbers = zip(backgrounds.pattern.tolist(), backgrounds.ground.tolist(), throws, strict=True)
    return tuple(background_phrase(*each) for each in numbers)


def _relation_phrase(relation: int, throw: int) -> str:
    if throw < 15:
        return "and"
    name = RELATIONS[relation]
    return _RELATIONS.get(name, name) if throw < 50 else name
