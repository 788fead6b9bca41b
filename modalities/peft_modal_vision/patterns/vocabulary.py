"""Which shapes and textures a set of pictures is made of; the two sets have nothing in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from peft_modal.data.drawn.distances import Distance, circle, cross, diamond, ring, square, triangle
from peft_modal_vision.patterns import shapes, textures


@dataclass(frozen=True)
class Vocabulary:
    """Shapes and textures by name, in label order; a class is one of each."""

    shapes: Mapping[str, Distance]
    textures: Mapping[str, Distance]
    is_weathered: bool
    """Uneven light, noise, and something in front, as pictures of another camera would have."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """`striped circle` and so on; the texture changes fastest."""
        return tuple(f"{texture} {shape}" for shape in self.shapes for texture in self.textures)


PRETRAIN: Final = Vocabulary(
    shapes={
        "circle": circle, "square": square, "triangle": triangle, "cross": cross, "diamond": diamond, "ring": ring,
        "star": shapes.star, "hexagon": shapes.hexagon, "crescent": shapes.crescent, "arrow": shapes.arrow,
        "capsule": shapes.capsule, "heart": shapes.heart,
    },
    textures={
        "plain": textures.plain, "striped": textures.stripes, "checked": textures.checks, "wavy": textures.waves,
        "dotted": textures.dots, "ringed": textures.rings, "meshed": textures.mesh, "scaly": textures.scales,
    },
    is_weathered=False,
)  # fmt: skip
DOWNSTREAM: Final = Vocabulary(
    shapes={
        "gear": shapes.gear, "dome": shapes.dome, "tee": shapes.tee, "ell": shapes.ell, "hourglass": shapes.hourglass,
        "frame": shapes.frame, "pie": shapes.pie, "bolt": shapes.bolt,
    },
    textures={"zigzag": textures.zigzag, "brick": textures.bricks, "rayed": textures.rays},
    is_weathered=True,
)  # fmt: skip
