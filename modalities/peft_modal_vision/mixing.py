"""Training pictures mixed in pairs, with both labels: mixup and CutMix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Generator

from peft_modal.data.epochs import Batch
from peft_modal.data.labels import OWN_SHARE, PARTNER_LABEL

MIXUP_ALPHA: Final = 0.8
CUTMIX_ALPHA: Final = 1.0
"""Of the Beta distributions; timm's defaults, which the recipes of SSF and RepAdapter keep."""


def mixed(batch: Batch, kinds: Sequence[str], generator: Generator) -> Batch:
    """A batch whose pictures are mixed with those from its other end; `kinds` holds `mixup`, `cutmix`, both or neither.

    With both, a batch is of one kind or the other with equal chance. mixup (Zhang et al., ICLR 2018, arXiv:1710.09412)
    adds up two pictures; CutMix (Yun et al., ICCV 2019, arXiv:1905.04899) puts a rectangle of one into the other. One
    share for the batch, as in timm.

    Args:
        batch: `image` (B, 3, H, W), `label` (B,), and what else belongs to the samples.
        kinds: What is asked for.
        generator: Of all random numbers.
    """
    chosen = [kind for kind in ("mixup", "cutmix") if kind in kinds]
    if not chosen:
        return batch
    kind = chosen[int(torch.randint(len(chosen), (), generator=generator))]
    image, partner = batch["image"], batch["image"].flip(0)
    if kind == "mixup":
        own = _beta(MIXUP_ALPHA, generator)
        image = own * image + (1 - own) * partner
    else:
        height, width = image.shape[-2:]
        rows, columns = _rectangle(height, width, 1 - _beta(CUTMIX_ALPHA, generator), generator)
        image = image.clone()
        image[..., rows, columns] = partner[..., rows, columns]
        inside = (rows.stop - rows.start) * (columns.stop - columns.start)
        own = 1 - inside / (height * width)
    count = len(image)
    return {**batch, "image": image, PARTNER_LABEL: batch["label"].flip(0), OWN_SHARE: torch.full((count,), own)}


def _beta(alpha: float, generator: Generator) -> float:
    """A draw from Beta(alpha, alpha)."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _rectangle(height: int, width: int, share: float, generator: Generator) -> tuple[slice, slice]:
    """Rows and columns around a point anywhere in the picture; what lies outside is cut off."""
    centres = torch.rand(2, generator=generator)
    found = []
    for side, centre in zip((height, width), centres.tolist(), strict=True):
        half = int(side * share**0.5) // 2
        middle = int(centre * side)
        found.append(slice(max(0, middle - half), min(side, middle + half)))
    return found[0], found[1]
