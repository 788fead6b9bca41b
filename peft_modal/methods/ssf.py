"""SSF: scaling and shifting features (Lian et al., NeurIPS 2022, arXiv:2210.08823)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method
from peft_modal.ranges import NonNegativeFloat


class SSF(Method):
    """Scale and shift features after chosen operations (Lian et al., NeurIPS 2022, arXiv:2210.08823).

    y[c] = scale[c] * x[c] + shift[c] per channel behind every selected linear, convolution and norm. Both fold into the
    operation's weight and bias, so a merged model costs nothing. Both are drawn at random, so a fresh adapter does not
    compute the pre-trained function.

    Args:
        sites: Operations to modulate; None for every linear, convolution and norm.
        init_std: Standard deviation of scale around 1 and of shift around 0.
    """

    identity_at_init = False

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] | None = None, init_std: NonNegativeFloat = 0.02
    ) -> None:
        self.sites = Selector() if sites is None else Selector.parse(sites)
        self.init_std = init_std

    def build(self, adapter: Adapter) -> None:
        """One pair of vectors per operation, on its output where it is called, else in its weight and bias."""
        anatomy = adapter.backbone.anatomy
        for site in anatomy.select(self.sites, needs=("call", "weight"), fused=True, optional=True):
            if site.op not in {"linear", "conv", "norm"} or site.role.endswith(".shift"):
                continue
            affine = ScaleShift(site.shape[0], channel_dim=site.out_dim, init_std=self.init_std)
            if "call" in site.reach and site.rows is None:
                port = anatomy.output_port(site)
                # Without a bias slot (RMSNorm) there is nothing that the shift could fold into.
                foldable = site if site.bias is not None else None
                adapter.branch(port, port, affine, name=site.name, mode="apply", folds_into=foldable)
            else:
                adapter.reparametrise(site, ScaledWeight(affine))
                adapter.reparametrise(site, ShiftedBias(affine, site.rows), name="", bias=True)


class ScaleShift(nn.Module):
    """y = scale * x + shift on one axis; the axis comes from the operation, never from a size comparison.

    Args:
        width: Number of channels.
        channel_dim: Channel axis: -1, or 1 for convolutions.
        init_std: See `SSF`.
    """

    def __init__(self, width: int, *, channel_dim: int, init_std: float) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.init_std = init_std
        self.scale = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale ~ N(1, init_std^2), shift ~ N(0, init_std^2)."""
        nn.init.normal_(self.scale, mean=1.0, std=self.init_std)
        nn.init.normal_(self.shift, std=self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C) or (B, C, ...) to the same shape."""
        if self.channel_dim == -1:
            return x * self.scale + self.shift
        shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
        return x * self.scale.view(shape) + self.shift.view(shape)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """diag(scale) W and scale * b + shift; a missing bias counts as zero."""
        scale = self.scale.view(-1, *(1 for _ in weight.shape[1:]))
        return scale * weight, self.shift.clone() if bias is None else self.scale * bias + self.shift


class ScaledWeight(nn.Module):
    """diag(scale) W, for operations that are not called."""

    def __init__(self, affine: ScaleShift) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, weight: Tensor) -> Tensor:
        """W (out, in) to the same shape."""
        return self.affine.scale.view(-1, *(1 for _ in weight.shape[1:])).to(weight.dtype) * weight


class ShiftedBias(nn.Module):
    """scale * b + shift, for operations that are not called.

    Args:
        affine: The pair shared with `ScaledWeight`.
        rows: Row slice of the operation in a fused tensor.

    Raises:
        ValueError: A slice of a fused tensor has no bias.
    """

    def __init__(self, affine: ScaleShift, rows: tuple[int, int] | None) -> None:
        super().__init__()
        self.affine = affine
        self.rows = rows

    def forward(self, bias: Tensor | None) -> Tensor:
        """B (out) or None to (out).

        Raises:
            ValueError: A slice of a fused tensor has no bias.
        """
        if bias is None:
            if self.rows is not None:
                raise ValueError("a row slice without a bias cannot be shifted; modulate the whole fused tensor")
            return self.affine.shift
        return self.affine.scale.to(bias.dtype) * bias + self.affine.shift.to(bias.dtype)
