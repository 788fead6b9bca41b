"""Generated pictures: textured shapes of many classes, and scenes with a mask."""

from peft_modal_vision.patterns.draw import draw_pattern, draw_patterns
from peft_modal_vision.patterns.scenes import SCENE_CLASSES, draw_masked_scenes
from peft_modal_vision.patterns.vocabulary import DOWNSTREAM, PRETRAIN, Vocabulary

__all__ = (
    "DOWNSTREAM",
    "PRETRAIN",
    "SCENE_CLASSES",
    "Vocabulary",
    "draw_masked_scenes",
    "draw_pattern",
    "draw_patterns",
)
