"""A binary mask over a frozen weight, trained through its threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.attach.packing import PacksItself
from peft_modal.errors import FileFormatError

SavedFor: TypeAlias = Any  # torch's context takes any attribute


class Mask(PacksItself):
    """1[m > threshold] * W for a weight of any shape.

    Args:
        shape: Of the weight.
        threshold: A weight is kept where m is above.
        init: Of m.
    """

    file_names: ClassVar[tuple[str, ...]] = ("mask_bits",)

    def __init__(self, shape: tuple[int, ...], *, threshold: float, init: float) -> None:
        super().__init__()
        # The comparison is one of float32 in every precision, so that a file's bits are what training used.
        self.threshold = float(np.float32(threshold))
        self.init = init
        self.mask_logit = nn.Parameter(torch.full(shape, init))

    def forward(self, weight: Tensor) -> Tensor:
        """The kept weights, others 0."""
        return cast("Tensor", _StraightThrough.apply(self.mask_logit, weight, self.threshold))

    def kept(self) -> Tensor:
        """Which weights are kept, bool of the weight's shape."""
        return self.mask_logit.detach() > self.threshold

    @override
    def packed(self) -> dict[str, Tensor]:
        """Row by row, eight entries a byte, the first one in the highest bit, zeros behind the last."""
        if self.mask_logit.is_meta:  # a count without values
            return {"mask_bits": self.mask_logit.new_empty(self._bytes(), dtype=torch.uint8)}
        return {"mask_bits": torch.from_numpy(np.packbits(self.kept().cpu().numpy().reshape(-1)))}

    def _bytes(self) -> int:
        return math.ceil(self.mask_logit.numel() / 8)

    @override
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        bits = np.unpackbits(tensors["mask_bits"].cpu().numpy(), count=self.mask_logit.numel())
        kept = torch.from_numpy(bits).to(self.mask_logit).view(self.mask_logit.shape)
        with torch.no_grad():
            self.mask_logit.copy_(self.threshold + (2 * kept - 1) * (self.init - self.threshold))

    @override
    def refuse(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        bits, size = tensors["mask_bits"], self._bytes()
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (size,):
            raise FileFormatError(
                f"tensor '{name}.mask_bits' is {bits.dtype} of shape {tuple(bits.shape)}; a bit for each of "
                f"{self.mask_logit.numel()} weights is {size} bytes"
            )


class _StraightThrough(torch.autograd.Function):
    """Weights above the threshold; to m the gradient of m * W."""

    @staticmethod
    def forward(ctx: SavedFor, logit: Tensor, weight: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(logit, weight)
        ctx.threshold = threshold
        return torch.where(logit > threshold, weight, weight.new_zeros(()))

    @staticmethod
    def backward(ctx: SavedFor, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        logit, weight = ctx.saved_tensors
        of_logit = (gradient * weight).to(logit.dtype) if ctx.needs_input_grad[0] else None
        of_weight = gradient * (logit > ctx.threshold) if ctx.needs_input_grad[1] else None
        return of_logit, of_weight, None
