"""Generated pictures: captioned scenes, open-ended pictures, and two new concepts to fine-tune for."""

from peft_modal.data.drawn.captions import caption_scenes
from peft_modal.data.drawn.checks import shows_style, shows_subject
from peft_modal.data.drawn.concepts import CONCEPT_WORDS
from peft_modal.data.drawn.draw import Drawn, draw_scenes, draw_style, draw_subject
from peft_modal.data.drawn.open_ended import draw_open_ended
from peft_modal.data.drawn.scenes import Backgrounds, Scenes, object_distance, paint_scenes, plan_scenes
from peft_modal.data.drawn.words import (
    COLOURS,
    GROUNDS,
    HELD_OUT,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Pairs,
    object_name,
    pair_mask,
    with_article,
)

__all__ = (
    "COLOURS",
    "CONCEPT_WORDS",
    "GROUNDS",
    "HELD_OUT",
    "PATTERNS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Backgrounds",
    "Drawn",
    "Pairs",
    "Scenes",
    "caption_scenes",
    "draw_open_ended",
    "draw_scenes",
    "draw_style",
    "draw_subject",
    "object_distance",
    "object_name",
    "paint_scenes",
    "pair_mask",
    "plan_scenes",
    "shows_style",
    "shows_subject",
    "with_article",
)
