"""Pictures of inputs: the modality's renderer draws, and what goes wrong in it never costs the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from peft_modal.report.blocks import Gallery, Tile
from peft_modal.report.style import data_uri, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDE = 190


class Renderer(Protocol):
    """Draws one sample of a modality; `Plugin.renderer` names a function like this."""

    def __call__(self, axes: Axes, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> bytes | None:
        """Draw, and return a short WAV file where a sample is to be heard, too.

        Args:
            axes: Empty, square, without frame and ticks, with equal units, on a transparent ground that may turn out
                light or dark.
            sample: One element of a batch without the batch axis, on the CPU.
            prediction: The task's own row for it, such as `Classification.predictions` gives.
        """


@dataclass(frozen=True)
class Pictures:
    """The drawn tiles of one gallery."""

    images: tuple[str, ...]
    """For each tile the `src` of its picture, "" where there is none."""
    sounds: tuple[str, ...]
    """For each tile the `src` of its player, likewise."""
    problem: str = ""
    """Why pictures are missing."""


def draw_gallery(gallery: Gallery, load: Callable[[], Renderer | None]) -> Pictures:
    """Draw the tiles of a gallery.

    Args:
        gallery: The tiles.
        load: Gives the modality's renderer, or None where it has none; may raise.
    """
    nothing = ("",) * len(gallery.tiles)
    try:
        renderer = load()
    except Exception as error:  # noqa: BLE001 — foreign code; the report says what failed
        return Pictures(nothing, nothing, f"Without pictures: {_sentence(error)}")
    if renderer is None:
        return Pictures(nothing, nothing)
    images, sounds, problem = [], [], ""
    for tile in gallery.tiles:
        try:
            image, sound = _drawn(renderer, tile)
            images.append(data_uri(image))
            sounds.append(data_uri(sound, "audio/wav") if sound else "")
        except Exception as error:  # noqa: BLE001 — foreign code; the report says what failed
            images.append("")
            sounds.append("")
            name = f"{getattr(renderer, '__module__', '?')}:{getattr(renderer, '__qualname__', repr(renderer))}"
            problem = problem or f"The renderer {name} failed: {_sentence(error)}"
    return Pictures(tuple(images), tuple(sounds), problem)


def _drawn(renderer: Renderer, tile: Tile) -> tuple[bytes, bytes | None]:
    """A tile's PNG, and its WAV file if there is one."""
    sounds: list[bytes | None] = []
    image = png(lambda axes: sounds.append(renderer(axes, tile.sample, tile.prediction)), size=_SIDE)
    return image, sounds[0]


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
