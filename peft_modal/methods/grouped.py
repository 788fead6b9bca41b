"""Matrices of groups."""

from __future__ import annotations

import torch
from torch import Tensor


def block_diagonal(*blocks: Tensor) -> Tensor:
    """The matrix with these on its diagonal and zero elsewhere."""
    out: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return out
