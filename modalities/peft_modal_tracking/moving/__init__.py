"""Generated videos of textured things that move over a moving ground."""

from __future__ import annotations

from peft_modal_tracking.moving.draw import GENERATOR_VERSION, draw_videos

__all__ = ["GENERATOR_VERSION", "draw_videos"]
