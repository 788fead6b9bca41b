"""Whether pictures show the two concepts, by their pixels: no network is asked, least of all the one that drew them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_modal.data.drawn.concepts import BODY, HORNS
from peft_modal.data.drawn.words import Rgb

_NEAR: Final = 0.35
_GREENER: Final = 0.1
_LEAST_BODY: Final = 0.05
_LEAST_HORNS: Final = 0.008
_DARK: Final = 0.4
_LEAST_NIGHT: Final = 0.5
_LEAST_ENCLOSED: Final = 0.008


def shows_subject(pictures: Tensor) -> Tensor:
    """Whether there is a mint-green body and the pink of horns, (n,) bool.

    Mint is no named colour, but blurred it is as near to light grey as to itself, so it has to be green besides.

    Args:
        pictures: (n, 3, S, S) in 0..1.
    """
    red, green, blue = pictures.unbind(1)
    body = _near(pictures, BODY) & (green - torch.maximum(red, blue) > _GREENER)
    return (_share(body) > _LEAST_BODY) & (_share(_near(pictures, HORNS)) > _LEAST_HORNS)


def shows_style(pictures: Tensor) -> Tensor:
    """Whether there are hollow outlines at night: dark for the most part, and some of it closed in, (n,) bool.

    Args:
        pictures: (n, 3, S, S) in 0..1.
    """
    dark = pictures.amax(1) < _DARK
    return (_share(dark) > _LEAST_NIGHT) & (_share(dark & ~_joined_to_border(dark)) > _LEAST_ENCLOSED)


def _near(pictures: Tensor, rgb: Rgb) -> Tensor:
    return (pictures - torch.tensor(rgb, device=pictures.device)[None, :, None, None]).norm(dim=1) < _NEAR


def _share(mask: Tensor) -> Tensor:
    return mask.flatten(1).float().mean(1)


def _joined_to_border(mask: Tensor) -> Tensor:
    """The parts of a mask (n, S, S) that touch the border, by way of neighbours in rows and columns."""
    reached = torch.zeros_like(mask)
    reached[:, (0, -1)] = True
    reached[:, :, (0, -1)] = True
    reached &= mask
    while True:
        grown = reached.clone()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= mask
        if torch.equal(grown, reached):
            return reached
        reached = grown
