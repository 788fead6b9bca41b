"""What a decision rests on: gradient times input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def relevance(score: Callable[[Mapping[str, Any]], Tensor], batch: Mapping[str, Any], key: str) -> Tensor:
    """How much each place of an input adds to a score: the sum over channels of input times gradient.

    Summed over a patch it is exactly what the patch's embedding contributes to first order (its bias aside). Shrikumar
    et al., Not Just a Black Box, 2016, arXiv:1605.01713.

    Args:
        score: One number per sample (B,) of a batch.
        batch: Inputs.
        key: Of the input (B, C, ...) in question.

    Returns:
        (B, ...), without the channels.
    """
    # Tensors of an evaluation were made in inference mode, where autograd may not save them; copies are ordinary ones.
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = copied[key].requires_grad_()
        (gradient,) = torch.autograd.grad(score(copied).sum(), x)
    return (x.detach() * gradient).sum(1)
